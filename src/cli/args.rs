//! Values as people write them on a command line: durations, sizes, money, pairs, lists of tools. Pure.

/// A duration in whole seconds: `90`, `90s`, `30m`, `1h30m`, `2d`.
pub(super) fn seconds(text: &str) -> Result<u32, String> {
    positive(text, "30m")?;
    let wrong = || format!("{text:?} is not a duration such as 90s, 30m or 1h30m");
    if let Ok(plain) = text.parse::<u32>() {
        return Ok(plain);
    }
    let (mut total, mut digits) = (0u64, String::new());
    for c in text.chars() {
        if c.is_ascii_digit() {
            digits.push(c);
            continue;
        }
        let unit = match c {
            's' => 1,
            'm' => 60,
            'h' => 3600,
            'd' => 86_400,
            _ => return Err(wrong()),
        };
        let n: u32 = digits.parse().map_err(|_| wrong())?;
        total += u64::from(n) * unit;
        digits.clear();
    }
    if !digits.is_empty() || text.is_empty() {
        return Err(wrong());
    }
    u32::try_from(total).map_err(|_| wrong())
}

/// A size in whole MiB: `512m`, `4g`, `1.5g`, `1t`, also `4GiB`. The unit must be there: a bare number could
/// be bytes to one reader and MiB to another.
pub(super) fn mib(text: &str) -> Result<u32, String> {
    positive(text, "4g")?;
    let wrong = || format!("{text:?} is not a size such as 512m or 4g");
    let lower = text.to_ascii_lowercase();
    let short = lower.strip_suffix("ib").or_else(|| lower.strip_suffix('b')).unwrap_or(&lower);
    let unit = short.chars().last().ok_or_else(wrong)?;
    let factor = match unit {
        'm' => 1.0,
        'g' => 1024.0,
        't' => 1024.0 * 1024.0,
        _ => return Err(wrong()),
    };
    let number = &short[..short.len() - 1];
    if !number.bytes().all(|b| b.is_ascii_digit() || b == b'.') {
        return Err(wrong());
    }
    let size = number.parse::<f64>().map_err(|_| wrong())? * factor;
    if size.fract() != 0.0 || !(1.0..=f64::from(u32::MAX)).contains(&size) {
        return Err(wrong());
    }
    Ok(size as u32)
}

/// Money in USD: `0.50`, `$2`.
pub(super) fn usd(text: &str) -> Result<f64, String> {
    let plain = text.strip_prefix('$').unwrap_or(text);
    positive(plain, "0.50")?;
    let amount: crate::money::MicroUsd =
        plain.parse().map_err(|e: crate::money::MoneyError| e.to_string())?;
    Ok(amount.as_usd())
}

/// How many of something.
pub(super) fn count(text: &str) -> Result<u32, String> {
    positive(text, "100")?;
    text.parse().map_err(|_| format!("{text:?} is not a whole number such as 100"))
}

/// Processor cores: `2`, `1.5`.
pub(super) fn cores(text: &str) -> Result<f64, String> {
    positive(text, "1.5")?;
    let cores = text.parse::<f64>().ok().filter(|cores| cores.is_finite());
    cores.ok_or_else(|| format!("{text:?} is not a number such as 1.5"))
}

/// Says what is wrong with `-1` in words: a limit is never below zero.
fn positive(text: &str, example: &str) -> Result<(), String> {
    let number = text
        .strip_prefix('-')
        .is_some_and(|rest| rest.starts_with(|c: char| c.is_ascii_digit() || c == '.' || c == '$'));
    if number { Err(format!("must be positive, e.g. {example}")) } else { Ok(()) }
}

/// `KEY=VALUE`.
pub(super) fn pair(text: &str) -> Result<(String, String), String> {
    match text.split_once('=') {
        Some((key, value)) if !key.is_empty() => Ok((key.to_owned(), value.to_owned())),
        Some(_) | None => Err(format!("{text:?} is not KEY=VALUE")),
    }
}

/// Lists of tools: entries are separated by commas, but not by those within parentheses.
pub(super) fn tools(lists: &[String]) -> Vec<String> {
    let mut all = Vec::new();
    for list in lists {
        let (mut depth, mut entry) = (0usize, String::new());
        for c in list.chars().chain([',']) {
            match c {
                '(' => depth += 1,
                ')' => depth = depth.saturating_sub(1),
                _ => {}
            }
            if c == ',' && depth == 0 {
                let done = std::mem::take(&mut entry);
                all.extend(Some(done.trim().to_owned()).filter(|e| !e.is_empty()));
            } else {
                entry.push(c);
            }
        }
        // A parenthesis that is never closed: the daemon says what is wrong with the entry.
        let rest = entry.trim_end_matches(',').trim();
        all.extend(Some(rest.to_owned()).filter(|e| !e.is_empty()));
    }
    all
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn durations_have_units() {
        let good = ["90", "90s", "30m", "1h30m", "2d"].map(seconds);
        assert_eq!(good, [Ok(90), Ok(90), Ok(1800), Ok(5400), Ok(172_800)]);
        for bad in ["", "m", "1h30", "-1", "1w", "5 m", "99999999d"] {
            assert!(seconds(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn sizes_must_have_units() {
        let good = ["512m", "4g", "1.5g", "4GiB", "1T", "512MB"].map(mib);
        assert_eq!(good, [Ok(512), Ok(4096), Ok(1536), Ok(4096), Ok(1_048_576), Ok(512)]);
        for bad in ["", "4096", "m", "0m", "-4g", "4k", "nang", "1e3m", "0.3m"] {
            assert!(mib(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn money_has_at_most_six_decimals() {
        assert_eq!(["0.50", "$2"].map(usd), [Ok(0.5), Ok(2.0)]);
        assert!(usd("-1").is_err() && usd("nan").is_err() && usd("0.0000001").is_err());
    }

    #[test]
    fn what_is_below_zero_is_told_so() {
        for wrong in [
            usd("-1").err(),
            usd("$-1").err(),
            seconds("-5m").err(),
            mib("-4g").err(),
            count("-1").err(),
            cores("-.5").err(),
        ] {
            assert!(
                wrong.as_deref().is_some_and(|words| words.starts_with("must be positive, e.g. ")),
                "{wrong:?}"
            );
        }
        assert_eq!((count("7"), cores("1.5")), (Ok(7), Ok(1.5)));
        assert!(
            count("x").is_err()
                && count("99999999999").is_err()
                && cores("inf").is_err()
                && cores("--json").is_err()
        );
    }

    #[test]
    fn commas_in_parentheses_belong_to_the_tool() {
        let lists = ["Read, Bash(git log, git diff),".to_owned(), "mcp__a__*".to_owned(), String::new()];
        assert_eq!(tools(&lists), ["Read", "Bash(git log, git diff)", "mcp__a__*"]);
        assert_eq!(tools(&["Bash(rm".to_owned()]), ["Bash(rm"]);
    }
}
