//! What tokens cost: list prices per model, exact costs of a usage, and worst cases for reservations. Integers
//! only, rounded up. An unknown model has no price: it must never be guessed.

use std::fmt;
use std::ops::Range;

use serde::{Deserialize, Deserializer, Serialize, de};

use crate::money::MicroUsd;
use crate::policy::Unpriced;

/// The price list that comes with hotcell.
const BUILT_IN: &str = include_str!("../policies/prices.toml");

/// Tokens that one request was billed for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Hash, Serialize, Deserialize, schemars::JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Usage {
    /// Input tokens that were neither read from nor written to the cache.
    pub input: u64,
    /// Output tokens, thinking included.
    pub output: u64,
    /// Input tokens read from the cache.
    pub cache_read: u64,
    /// Input tokens written to the cache for five minutes.
    pub cache_write_5m: u64,
    /// Input tokens written to the cache for one hour.
    pub cache_write_1h: u64,
    /// Searches of the web that the provider made.
    #[serde(skip_serializing_if = "is_zero")]
    pub web_searches: u64,
}

impl Usage {
    /// Adds another request's tokens.
    pub fn add(&mut self, other: &Self) {
        let Self { input, output, cache_read, cache_write_5m, cache_write_1h, web_searches } = self;
        for (sum, more) in [
            (input, other.input),
            (output, other.output),
            (cache_read, other.cache_read),
            (cache_write_5m, other.cache_write_5m),
            (cache_write_1h, other.cache_write_1h),
            (web_searches, other.web_searches),
        ] {
            *sum = sum.saturating_add(more);
        }
    }
}

fn is_zero(number: &u64) -> bool {
    *number == 0
}

impl Usage {
    /// All input tokens, however they were billed.
    pub fn input_total(&self) -> u64 {
        [self.input, self.cache_read, self.cache_write_5m, self.cache_write_1h]
            .into_iter()
            .fold(0, u64::saturating_add)
    }
}

/// A price list that cannot be used.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum PricesError {
    /// Not TOML, or a key or type that a price list does not have.
    #[error("{file}:{line}: {message}")]
    Syntax {
        /// The name given by the caller.
        file: String,
        /// Line, counted from 1.
        line: usize,
        /// What the parser says; names the key.
        message: String,
    },
    /// The same name twice.
    #[error("{file}: model {name:?} has two prices: keep one")]
    Twice {
        /// The name given by the caller.
        file: String,
        /// The model.
        name: String,
    },
}

/// Prices of one model, in micro-USD per million tokens.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Rates {
    /// Input that no cache is involved in.
    pub input: MicroUsd,
    /// Output.
    pub output: MicroUsd,
    /// Writing to the five-minute cache.
    pub cache_write_5m: MicroUsd,
    /// Writing to the one-hour cache.
    pub cache_write_1h: MicroUsd,
    /// Reading from the cache.
    pub cache_read: MicroUsd,
}

/// The longest-lived cache that a request writes to.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum CacheWrite {
    /// The five-minute cache, or none.
    FiveMinutes,
    /// The one-hour cache: the dearest.
    #[default]
    OneHour,
}

/// What one model costs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Price {
    rates: Rates,
    /// Other rates for requests whose input is above a number of tokens.
    long: Option<(u64, Rates)>,
    /// The most output tokens that the model gives in one reply; `u64::MAX` where nobody knows.
    pub output_tokens_max: u64,
    /// One search of the web, beside its tokens; none where the list has no price for it.
    pub web_search: Option<MicroUsd>,
}

/// A price list.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Prices {
    models: Vec<(String, Price)>,
    web_search: Option<MicroUsd>,
}

impl Price {
    /// What `usage` costs, rounded up to a whole micro-USD; searches of the web without a price cost nothing,
    /// so that a request that could make one must be refused.
    pub fn cost(&self, usage: &Usage) -> MicroUsd {
        let rates = self.rates_for(usage.input_total());
        let tokens = cost_of(&[
            (usage.input, rates.input),
            (usage.output, rates.output),
            (usage.cache_read, rates.cache_read),
            (usage.cache_write_5m, rates.cache_write_5m),
            (usage.cache_write_1h, rates.cache_write_1h),
        ]);
        tokens.plus(MicroUsd(self.web_search.unwrap_or_default().0.saturating_mul(usage.web_searches)))
    }

    /// The most that a request can cost: all input at its dearest (a cache write), all output used.
    pub fn worst_case(&self, input_tokens_max: u64, output_tokens_max: u64, cache: CacheWrite) -> MicroUsd {
        let rates = self.rates_for(input_tokens_max);
        let short = rates.input.max(rates.cache_write_5m).max(rates.cache_read);
        let dearest = match cache {
            CacheWrite::FiveMinutes => short,
            CacheWrite::OneHour => short.max(rates.cache_write_1h),
        };
        cost_of(&[(input_tokens_max, dearest), (output_tokens_max, rates.output)])
    }

    /// How many output tokens `amount` pays for beside the worst case of `input_tokens_max`.
    pub fn output_tokens_within(&self, amount: MicroUsd, input_tokens_max: u64, cache: CacheWrite) -> u64 {
        let left = amount.minus(self.worst_case(input_tokens_max, 0, cache));
        let per_million = self.rates_for(input_tokens_max).output.0;
        if per_million == 0 {
            return u64::MAX;
        }
        let tokens = u128::from(left.0) * 1_000_000 / u128::from(per_million);
        u64::try_from(tokens).unwrap_or(u64::MAX)
    }

    fn rates_for(&self, input_tokens: u64) -> &Rates {
        match &self.long {
            Some((above, rates)) if input_tokens > *above => rates,
            _ => &self.rates,
        }
    }
}

fn cost_of(parts: &[(u64, MicroUsd)]) -> MicroUsd {
    let sum = parts.iter().fold(0u128, |sum, (tokens, per_million)| {
        sum.saturating_add(u128::from(*tokens) * u128::from(per_million.0))
    });
    MicroUsd(u64::try_from(sum.div_ceil(1_000_000)).unwrap_or(u64::MAX))
}

impl Prices {
    /// Parses a price list; `file` is only for messages.
    ///
    /// # Errors
    /// See [`PricesError`].
    pub fn parse(text: &str, file: &str) -> Result<Self, PricesError> {
        let raw: RawPrices = toml::from_str(text).map_err(|e| PricesError::Syntax {
            file: file.to_owned(),
            line: line_of(text, e.span()),
            message: e.message().trim().replace('\n', ", "),
        })?;
        let mut models: Vec<(String, Price)> = Vec::new();
        let web_search = raw.web_search_per_use.map(|usd| usd.0);
        for entry in raw.model {
            let price = Price { web_search, ..entry.price() };
            for name in entry.names {
                if models.iter().any(|(known, _)| *known == name) {
                    return Err(PricesError::Twice { file: file.to_owned(), name });
                }
                models.push((name, price));
            }
        }
        Ok(Self { models, web_search })
    }

    /// The list that comes with hotcell (`policies/prices.toml`).
    ///
    /// # Errors
    /// None in a build that passed its tests.
    pub fn built_in() -> Result<Self, PricesError> {
        Self::parse(BUILT_IN, "policies/prices.toml")
    }

    /// The price of `model`: the longest name that means it (see [`names_model`]).
    pub fn of(&self, model: &str) -> Option<&Price> {
        let known = self.models.iter().filter(|(name, _)| names_model(name, model));
        known.max_by_key(|(name, _)| name.len()).map(|(_, price)| price)
    }

    /// The price of `model`, or where it has none the highest that the policy takes any such model to have: its
    /// input and output, cache writes twice its input, cache reads its input.
    pub fn of_or(&self, model: &str, unpriced: Option<&Unpriced>) -> Option<Price> {
        let listed = self.of(model).copied();
        listed.or_else(|| {
            let (input, output) = unpriced?.rates().ok()?;
            let rates = Rates {
                input,
                output,
                cache_write_5m: input.plus(input),
                cache_write_1h: input.plus(input),
                cache_read: input,
            };
            Some(Price { rates, long: None, output_tokens_max: u64::MAX, web_search: self.web_search })
        })
    }

    /// All names in the list.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.models.iter().map(|(name, _)| name.as_str())
    }
}

/// Whether `name` means `model`: the same, or `model` is its dated or latest variant
/// (`claude-haiku-4-5` means `claude-haiku-4-5-20251001`), or `name` ends in `*` and is its prefix.
pub fn names_model(name: &str, model: &str) -> bool {
    if let Some(prefix) = name.strip_suffix('*') {
        return model.starts_with(prefix);
    }
    match model.strip_prefix(name) {
        None => false,
        Some("" | "-latest") => true,
        Some(rest) => rest
            .strip_prefix(['-', '@'])
            .is_some_and(|date| date.len() == 8 && date.bytes().all(|b| b.is_ascii_digit())),
    }
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct RawPrices {
    web_search_per_use: Option<Usd>,
    model: Vec<RawModel>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct RawModel {
    names: Vec<String>,
    input: Usd,
    output: Usd,
    cache_write_5m: Usd,
    cache_write_1h: Usd,
    cache_read: Usd,
    output_tokens_max: u64,
    long_input: Option<RawLong>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct RawLong {
    above_tokens: u64,
    input: Usd,
    output: Usd,
    cache_write_5m: Usd,
    cache_write_1h: Usd,
    cache_read: Usd,
}

impl RawModel {
    fn price(&self) -> Price {
        let rates = Rates {
            input: self.input.0,
            output: self.output.0,
            cache_write_5m: self.cache_write_5m.0,
            cache_write_1h: self.cache_write_1h.0,
            cache_read: self.cache_read.0,
        };
        let long = self.long_input.as_ref().map(|long| {
            let rates = Rates {
                input: long.input.0,
                output: long.output.0,
                cache_write_5m: long.cache_write_5m.0,
                cache_write_1h: long.cache_write_1h.0,
                cache_read: long.cache_read.0,
            };
            (long.above_tokens, rates)
        });
        Price { rates, long, output_tokens_max: self.output_tokens_max, web_search: None }
    }
}

/// Dollars as a TOML number or string.
struct Usd(MicroUsd);

impl<'de> Deserialize<'de> for Usd {
    fn deserialize<D: Deserializer<'de>>(from: D) -> Result<Self, D::Error> {
        struct Visitor;
        impl de::Visitor<'_> for Visitor {
            type Value = Usd;
            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a price in USD, e.g. 3.75")
            }
            fn visit_f64<E: de::Error>(self, usd: f64) -> Result<Usd, E> {
                MicroUsd::from_usd(usd).map(Usd).map_err(E::custom)
            }
            fn visit_i64<E: de::Error>(self, usd: i64) -> Result<Usd, E> {
                self.visit_f64(usd as f64)
            }
            fn visit_str<E: de::Error>(self, usd: &str) -> Result<Usd, E> {
                usd.parse().map(Usd).map_err(E::custom)
            }
        }
        from.deserialize_any(Visitor)
    }
}

fn line_of(text: &str, span: Option<Range<usize>>) -> usize {
    let end = span.map_or(0, |span| span.start).min(text.len());
    text.as_bytes()[..end].iter().filter(|byte| **byte == b'\n').count() + 1
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn sonnet() -> Price {
        *Prices::built_in().unwrap().of("claude-sonnet-4-6").unwrap()
    }

    #[test]
    fn list_prices_are_exact() {
        let million = 1_000_000;
        let each = |usage: Usage| sonnet().cost(&usage).0;
        assert_eq!(each(Usage { input: million, ..Usage::default() }), 3_000_000);
        assert_eq!(each(Usage { output: million, ..Usage::default() }), 15_000_000);
        assert_eq!(each(Usage { cache_write_5m: million, ..Usage::default() }), 3_750_000);
        assert_eq!(each(Usage { cache_write_1h: million, ..Usage::default() }), 6_000_000);
        assert_eq!(each(Usage { cache_read: million, ..Usage::default() }), 300_000);
        assert_eq!(each(Usage { cache_read: 1, ..Usage::default() }), 1, "rounded up");
        let haiku = *Prices::built_in().unwrap().of("claude-haiku-4-5-20251001").unwrap();
        assert_eq!(haiku.cost(&Usage { input: million, output: million, ..Usage::default() }).0, 6_000_000);
    }

    #[test]
    fn an_unknown_model_has_no_price_and_a_dated_one_has() {
        let prices = Prices::built_in().unwrap();
        for model in ["gpt-5", "claude-sonnet-4-66", "claude-opus-4-8-fast", "claude-sonnet-4-6-2026", ""] {
            assert!(prices.of(model).is_none(), "{model}");
        }
        assert_eq!(prices.of("claude-opus-4-8-20260301"), prices.of("claude-opus-4-8"));
        assert_ne!(prices.of("claude-opus-4-1"), prices.of("claude-opus-4-8"));
    }

    #[test]
    fn a_model_without_a_price_is_priced_at_the_maximum_that_the_policy_names() {
        let prices = Prices::built_in().unwrap();
        let unpriced = Unpriced { input: 20.0, output: 100.0 };
        assert_eq!(prices.of_or("gpt-5", None), None);
        assert_eq!(
            prices.of_or("claude-sonnet-4-6", Some(&unpriced)),
            Some(sonnet()),
            "a listed price stays"
        );
        let price = prices.of_or("gpt-5", Some(&unpriced)).unwrap();
        let each = |usage: Usage| price.cost(&usage).0;
        assert_eq!(each(Usage { input: 10, ..Usage::default() }), 200);
        assert_eq!(each(Usage { output: 10, ..Usage::default() }), 1000);
        assert_eq!(each(Usage { cache_write_5m: 10, ..Usage::default() }), 400);
        assert_eq!(each(Usage { cache_write_1h: 10, ..Usage::default() }), 400);
        assert_eq!(each(Usage { cache_read: 10, ..Usage::default() }), 200);
        assert_eq!(price.worst_case(10, 10, CacheWrite::FiveMinutes).0, 400 + 1000);
    }

    #[test]
    fn a_search_of_the_web_costs_what_the_list_says() {
        assert_eq!(sonnet().web_search, Some(MicroUsd(10_000)));
        assert_eq!(sonnet().cost(&Usage { web_searches: 3, ..Usage::default() }).0, 30_000);
        let own = "[[model]]\nnames=['a']\ninput=1\noutput=1\ncache_write_5m=1\ncache_write_1h=1\ncache_read=1\noutput_tokens_max=1\n";
        assert_eq!(Prices::parse(own, "p").unwrap().of("a").unwrap().web_search, None);
        assert!(Prices::parse(&format!("web_search_per_use = -1\n{own}"), "p").is_err());
    }

    #[test]
    fn a_bad_list_names_the_line() {
        let error = Prices::parse("[[model]]\nnames = [\"a\"]\ninputs = 3\n", "p.toml").unwrap_err();
        assert!(error.to_string().starts_with("p.toml:3: "), "{error}");
        let entry = "[[model]]\nnames=['a']\ninput=1\noutput=1\ncache_write_5m=1\ncache_write_1h=1\ncache_read=1\noutput_tokens_max=1\n";
        assert!(matches!(Prices::parse(&entry.repeat(2), "p"), Err(PricesError::Twice { .. })));
        assert!(Prices::parse(&entry.replace("input=1\n", "input=-1\n"), "p").is_err());
    }

    proptest! {
        #[test]
        fn the_worst_case_is_never_below_the_cost(
            parts in prop::array::uniform4(0u64..400_000), output in 0u64..200_000
        ) {
            let [input, cache_read, cache_write_5m, cache_write_1h] = parts;
            let usage = Usage { input, output, cache_read, cache_write_5m, cache_write_1h, web_searches: 0 };
            for name in Prices::built_in().unwrap().names() {
                let price = *Prices::built_in().unwrap().of(name).unwrap();
                prop_assert!(price.worst_case(usage.input_total(), output, CacheWrite::OneHour) >= price.cost(&usage));
                let short = Usage { cache_write_1h: 0, ..usage };
                let worst = price.worst_case(short.input_total(), output, CacheWrite::FiveMinutes);
                prop_assert!(worst >= price.cost(&short));
            }
        }

        #[test]
        fn output_within_an_amount_never_costs_more(amount in 0u64..10_000_000, input in 0u64..1_000_000) {
            let price = sonnet();
            let tokens = price.output_tokens_within(MicroUsd(amount), input, CacheWrite::OneHour);
            let floor = price.worst_case(input, 0, CacheWrite::OneHour);
            prop_assert!(price.worst_case(input, tokens, CacheWrite::OneHour) <= MicroUsd(amount).max(floor));
        }
    }
}
