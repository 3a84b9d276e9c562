//! The machine alone, with a clock of numbers.

use proptest::prelude::*;

use super::*;

const LIMITED: Ending = Ending::Limited { retry_after_ms: None };

fn job(n: u64) -> JobId {
    JobId::new(n, 0)
}

fn after(ms: u64) -> Ending {
    Ending::Limited { retry_after_ms: Some(ms) }
}

/// A turn for a job, if it gets one at once.
fn go_for(pace: &mut Pace, who: u64, now_ms: u64) -> Option<u64> {
    let ticket = pace.queue(&job(who));
    match pace.next(now_ms) {
        Some(given) => {
            assert_eq!(given.ticket, ticket);
            Some(given.epoch)
        }
        None => {
            pace.leave(&job(who), ticket);
            None
        }
    }
}

fn go(pace: &mut Pace, now_ms: u64) -> Option<u64> {
    go_for(pace, 1, now_ms)
}

fn end(pace: &mut Pace, epoch: u64, ending: Ending, now_ms: u64) {
    pace.end(&job(1), epoch, ending, now_ms);
}

/// One request of a job from its turn to its end.
fn one(pace: &mut Pace, who: u64, ending: Ending, now_ms: u64) {
    let epoch = go_for(pace, who, now_ms).expect("a turn");
    pace.end(&job(who), epoch, ending, now_ms);
}

#[test]
fn a_limit_pauses_everyone_halves_once_and_growth_brings_it_back() {
    let mut pace = Pace::default();
    let turns: Vec<u64> = (0..8).map(|_| go(&mut pace, 0).unwrap()).collect();
    for turn in &turns {
        end(&mut pace, *turn, after(5_000), 10);
    }
    assert_eq!((pace.limit, pace.running, pace.strikes), (4, 0, 1), "eight at once are one limit");
    assert_eq!((go(&mut pace, 5_009), go_for(&mut pace, 2, 5_009), pace.paused_ms(10)), (None, None, 5_000));
    let turns: Vec<u64> = (0..9).filter_map(|_| go(&mut pace, 5_010)).collect();
    assert_eq!(turns.len(), 4, "fewer at a time");
    turns.iter().for_each(|turn| end(&mut pace, *turn, Ending::Served, 5_020));
    assert_eq!((pace.limit, pace.strikes), (5, 0));
    assert!(go(&mut pace, 5_020 + GROW_MS).is_some());
    assert_eq!(pace.limit, 6, "time without a limit counts, too");
}

#[test]
fn without_a_word_the_pause_doubles_to_a_minute() {
    let (mut pace, mut now) = (Pace::default(), 0);
    let mut pauses = Vec::new();
    for _ in 0..9 {
        let turn = go(&mut pace, now).unwrap();
        end(&mut pace, turn, LIMITED, now);
        pauses.push(pace.paused_ms(now) / 1_000);
        now += pace.paused_ms(now);
    }
    assert_eq!(pauses, [1, 2, 4, 8, 16, 32, 60, 60, 60]);
    one(&mut pace, 1, Ending::Served, now);
    one(&mut pace, 1, after(u64::MAX), now);
    assert_eq!(pace.paused_ms(now), PAUSE_MS_MAX, "no header stops a credential for ever");
}

#[test]
fn turns_go_round_the_jobs_however_many_requests_one_of_them_has() {
    let mut pace = Pace { limit: 2, ..Pace::default() };
    let mut tickets: BTreeMap<u64, u64> = BTreeMap::new();
    for _ in 0..50 {
        tickets.insert(pace.queue(&job(1)), 1);
    }
    for who in [2, 3, 2] {
        tickets.insert(pace.queue(&job(who)), who);
    }
    let (mut running, mut order) = (Vec::new(), Vec::new());
    for _ in 0..8 {
        while let Some(given) = pace.next(0) {
            order.push(tickets[&given.ticket]);
            running.push((tickets[&given.ticket], given.epoch));
        }
        let (who, epoch) = running.remove(0);
        pace.end(&job(who), epoch, Ending::Other, 0);
    }
    assert_eq!(order[..6], [1, 2, 3, 1, 2, 1], "nobody waits for more than one request of each other");
}

#[test]
fn a_job_that_is_limited_again_and_again_while_others_are_served_pauses_only_itself() {
    let (mut pace, mut now) = (Pace::default(), 0);
    one(&mut pace, 2, Ending::Served, now);
    one(&mut pace, 1, after(1_000), now);
    assert_eq!(go_for(&mut pace, 2, now), None, "the first time it is believed");
    for round in 0..20 {
        now += 1_000;
        one(&mut pace, 2, Ending::Served, now);
        // Other requests of its own in between change nothing.
        if round % 3 == 0 {
            one(&mut pace, 1, Ending::Served, now);
        }
        one(&mut pace, 1, after(1_000), now);
        assert_eq!(pace.paused_ms(now), 0, "round {round}");
        assert_eq!(pace.paused_for_ms(&job(1), now), 1_000);
        assert_eq!(go_for(&mut pace, 1, now), None);
        one(&mut pace, 2, Ending::Served, now);
    }
    assert!(pace.limit >= 1 && pace.strikes <= 1);
}

#[test]
fn a_limit_that_strikes_several_jobs_is_everybodys() {
    let (mut pace, mut now) = (Pace::default(), 0);
    for _ in 0..10 {
        for who in [1, 2] {
            one(&mut pace, 3 - who, Ending::Served, now);
            one(&mut pace, who, after(500), now);
            assert!(go_for(&mut pace, 1, now).is_none() && go_for(&mut pace, 2, now).is_none());
            now += 500;
        }
    }
}

#[test]
fn who_is_served_after_each_pause_of_others_does_not_wait_for_them_any_more() {
    let (mut pace, mut now) = (Pace::default(), 0);
    one(&mut pace, 9, Ending::Served, now);
    // Two that vouch for each other, or ever new ones.
    for round in 0..10u64 {
        one(&mut pace, 100 + round, after(60_000), now);
        let free = go_for(&mut pace, 9, now);
        assert_eq!(free.is_some(), round >= u64::from(SPARED_FROM), "round {round}");
        if let Some(epoch) = free {
            pace.end(&job(9), epoch, Ending::Served, now);
        }
        now += 60_000;
        one(&mut pace, 9, Ending::Served, now);
    }
    // Limited itself, it waits with all others again.
    one(&mut pace, 9, after(60_000), now);
    now += 60_000;
    one(&mut pace, 9, Ending::Served, now);
    one(&mut pace, 200, after(60_000), now);
    assert_eq!(go_for(&mut pace, 9, now), None);
}

#[test]
fn versions_of_a_model_are_one_class_and_long_inputs_another() {
    let name = |model: &str, tokens| Class::new(model, tokens).to_string();
    for version in
        ["claude-opus-4-8", "claude-opus-4-8-20260301", "claude-opus-4-8@20260301", "claude-opus-4-8-latest"]
    {
        assert_eq!(name(version, LONG_INPUT_TOKENS), "claude-opus-4-8");
        assert_eq!(name(version, LONG_INPUT_TOKENS + 1), "claude-opus-4-8[1m]");
    }
    assert_ne!(name("claude-opus-4-8", 0), name("claude-opus-4-1", 0));
    assert_eq!(Class::of_job("claude-opus-4-8[1m]"), Class::new("claude-opus-4-8", u64::MAX));
    assert_eq!(Class::of_job("claude-opus-4-8-20260301"), Class::new("claude-opus-4-8", 0));
}

#[test]
fn the_jobs_remembered_are_bounded_and_forgetting_changes_no_sum() {
    let mut pace = Pace::default();
    for who in 0..3 * JOBS_MAX as u64 {
        one(&mut pace, who, Ending::Served, 0);
    }
    assert_eq!(pace.members.len(), JOBS_MAX);
    assert_eq!(pace.served_all, pace.members.values().map(|member| member.served).sum::<u64>());
}

#[derive(Debug, Clone)]
enum Step {
    Queue(u64),
    Leave(usize),
    Next,
    End(usize, Ending),
    Pass(u64),
}

fn step() -> impl Strategy<Value = Step> {
    let ending = prop_oneof![
        3 => Just(Ending::Served), 1 => Just(Ending::Other), 1 => Just(LIMITED),
        1 => any::<u64>().prop_map(|ms| after(ms % 20_000)),
    ];
    prop_oneof![
        4 => (0u64..4).prop_map(Step::Queue),
        1 => any::<usize>().prop_map(Step::Leave),
        8 => Just(Step::Next),
        4 => (any::<usize>(), ending).prop_map(|(i, ending)| Step::End(i, ending)),
        2 => (0u64..30_000).prop_map(Step::Pass),
    ]
}

proptest! {
    #[test]
    fn any_course_keeps_the_limit_the_fairness_and_the_pauses(steps in prop::collection::vec(step(), 0..300)) {
        let (mut pace, mut now) = (Pace::default(), 0u64);
        let mut queue: Vec<(u64, u64)> = Vec::new();
        let mut running: Vec<(u64, u64)> = Vec::new();
        let paused = |pace: &Pace, who: u64, now| pace.paused_for_ms(&job(who), now);
        for step in steps {
            let under_way = |running: &[(u64, u64)], who| running.iter().filter(|(of, _)| *of == who).count();
            match step {
                Step::Queue(who) => queue.push((who, pace.queue(&job(who)))),
                Step::Leave(i) if !queue.is_empty() => {
                    let (who, ticket) = queue.remove(i % queue.len());
                    pace.leave(&job(who), ticket);
                }
                Step::Next => {
                    let Some(given) = pace.next(now) else {
                        let stuck = (running.len() as u32) < pace.limit
                            && queue.iter().any(|(who, _)| paused(&pace, *who, now) == 0);
                        prop_assert!(!stuck, "there was room, and somebody who may go");
                        for (who, _) in &queue {
                            prop_assert!(pace.wake_ms(&job(*who), now) > now);
                        }
                        continue;
                    };
                    let at = queue.iter().position(|(_, ticket)| *ticket == given.ticket).expect("it waited");
                    let (who, _) = queue.remove(at);
                    prop_assert_eq!(paused(&pace, who, now), 0, "not in a pause of its own");
                    let oldest = queue.iter().all(|(of, ticket)| *of != who || *ticket > given.ticket);
                    prop_assert!(oldest, "within a job first come, first served");
                    for (other, _) in &queue {
                        let fair = under_way(&running, *other) >= under_way(&running, who);
                        prop_assert!(fair || paused(&pace, *other, now) > 0, "who has less goes first");
                    }
                    running.push((who, given.epoch));
                    prop_assert!(running.len() as u32 <= pace.limit);
                }
                Step::End(i, ending) if !running.is_empty() => {
                    let (limit, pause) = (pace.limit, pace.paused_ms(now));
                    let (who, epoch) = running.remove(i % running.len());
                    pace.end(&job(who), epoch, ending, now);
                    match ending {
                        Ending::Limited { .. } => prop_assert!(pace.limit <= limit),
                        Ending::Served | Ending::Other => prop_assert!(pace.limit >= limit),
                    }
                    prop_assert!(pace.paused_ms(now) >= pause, "no pause is shortened");
                }
                Step::Pass(ms) => now += ms,
                Step::Leave(_) | Step::End(..) => {}
            }
            prop_assert!(pace.limit >= 1 && pace.limit <= RUNNING_MAX);
            prop_assert_eq!((pace.running as usize, pace.waiting), (running.len(), queue.len()));
        }
        // Nothing is stuck: once all have ended and the pauses are over, everybody who waits gets a turn.
        for (who, epoch) in running.drain(..) {
            pace.end(&job(who), epoch, Ending::Other, now);
        }
        now += PAUSE_MS_MAX + 1;
        while !queue.is_empty() {
            let given = pace.next(now).expect("a turn");
            let at = queue.iter().position(|(_, ticket)| *ticket == given.ticket).expect("it waited");
            let (who, _) = queue.remove(at);
            pace.end(&job(who), given.epoch, Ending::Other, now);
        }
    }
}
