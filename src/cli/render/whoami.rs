//! `hotcell whoami` for people. Pure.

use super::{Paint, Style, Text, one_line, words};
use crate::api::cost::BudgetView;
use crate::api::wire::WhoAmI;

/// Who we are and what we may do.
pub(crate) fn whoami(paint: Paint, me: &WhoAmI) -> Text {
    let name = me.user.clone().unwrap_or_else(|| "(no name)".into());
    let mut text =
        Text::new(paint).add(Style::Bold, &one_line(&name, 80)).plain(&format!("  uid {}", me.uid));
    if me.admin {
        text = text.plain("  ").add(Style::Good, "admin");
    }
    text = text.end();
    let group = |g: &crate::api::wire::GroupView| g.name.clone().unwrap_or_else(|| g.gid.to_string());
    let groups: Vec<String> = me.groups.iter().map(group).collect();
    text = row(text, "groups", &groups.join(", "));
    if !me.listed {
        let words = "not listed: the daemon's [[access]] names neither you nor a group of yours";
        return text.plain("  ").add(Style::Bad, words).end();
    }
    let rule = match (me.access.is_empty(), me.admin) {
        (false, _) => me.access.join(" and "),
        (true, true) => "admin: everything".into(),
        (true, false) => "no [[access]]: everybody who can open the socket may do everything".into(),
    };
    text = row(text, "access", &rule);
    for (n, policy) in me.policies.iter().enumerate() {
        let mark = if me.default_policy.as_ref() == Some(&policy.name) { " (default)" } else { "" };
        let cost = words::dollars_limit(policy.cost_usd);
        let words = format!("{}{mark}, {cost} a job: {}", policy.name, one_line(&policy.description, 100));
        text = row(text, if n == 0 { "policies" } else { "" }, &words);
    }
    if me.policies.is_empty() {
        text = row(text, "policies", "none");
    }
    text = row(text, "providers", &me.providers.join(", "));
    text = row(text, "images", &me.images.join(", "));
    let slots = &me.slots;
    text = row(text, "slots", &format!("{} of {} in use, {} waiting", slots.used, slots.max, slots.queued));
    for budget in &me.budgets {
        text = row(text, "budget", &standing(budget));
    }
    text
}

fn row(text: Text, label: &str, value: &str) -> Text {
    text.add(Style::Dim, &format!("  {label:<10}")).plain(&one_line(value, 400)).end()
}

fn standing(budget: &BudgetView) -> String {
    let limit = words::dollars_limit(budget.limit_usd);
    let left = (budget.limit_usd - budget.spent_usd - budget.reserved_usd).max(0.0);
    let resets = budget.resets_at.as_ref().map(|at| format!(", anew at {at}")).unwrap_or_default();
    let (spent, left) = (words::dollars(budget.spent_usd), words::dollars(left));
    format!("{}: {limit}, {spent} spent, {left} left{resets}", budget.scope.words())
}
