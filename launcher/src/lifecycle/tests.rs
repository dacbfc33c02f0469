//! Tests of the state machine, as tables of events and orders.

use libc::{SIGHUP, SIGINT, SIGSEGV, SIGTERM, SIGUSR1};

use super::*;

const GRACE: Duration = Duration::from_secs(10);
const INSPECTION: Duration = Duration::from_secs(5);

fn life(max_restarts: u32) -> Lifecycle {
    Lifecycle::new(GRACE, INSPECTION, SIGTERM, Restarts::new(max_restarts))
}

fn ended(rank: usize, code: i32) -> Event {
    Event::WorkerEnded { rank, exit: Exit::Code(code) }
}

fn killed(rank: usize, signal: i32) -> Event {
    Event::WorkerEnded { rank, exit: Exit::Signal(signal) }
}

const GONE: Event = Event::AllGone { step: None };
const TERM: Option<Order> = Some(Order::Signal(SIGTERM));
const HUP: Option<Order> = Some(Order::Signal(SIGHUP));

/// Events, all at one moment, with the order that each gives; then the launcher's exit code.
fn check(max_restarts: u32, events: &[(Event, Option<Order>)], code: u8) {
    let (mut life, now) = (life(max_restarts), Instant::now());
    for (number, &(event, order)) in events.iter().enumerate() {
        assert_eq!(life.on(event, now), order, "event {number} of {events:?}");
    }
    assert_eq!(life.exit_code(), code, "{events:?}");
}

#[test]
fn success_ends_nobody() {
    check(0, &[(ended(0, 0), None), (ended(1, 0), None), (GONE, None)], 0);
}

#[test]
fn the_first_failure_is_the_cause() {
    let events =
        [(ended(2, 0), None), (killed(1, SIGSEGV), TERM), (ended(0, 1), None), (GONE, None)];
    check(0, &events, 139);
}

#[test]
fn workers_that_hang_are_looked_at_before_they_end() {
    let hang = (Event::Hung { rank: Some(3) }, Some(Order::Inspect));
    let peers = (Event::PeerEnds(Cause::Hang { rank: None }), Some(Order::Inspect));
    let seen = (Event::Inspected, TERM);
    let rest = [(ended(0, 1), None), (GONE, None)];
    check(0, &[hang, seen, rest[0], (Event::Inspected, None), rest[1]], 40);
    check(0, &[peers, (ended(0, 1), None), seen, rest[1]], 40);
    let interrupted = (Event::Signalled(SIGINT), Some(Order::Signal(SIGINT)));
    check(0, &[hang, interrupted, (Event::Inspected, None), rest[0], rest[1]], 40);
    check(0, &[(Event::Inspected, None), (ended(0, 3), TERM), (hang.0, None)], 3);

    let (mut life, start) = (life(0), Instant::now());
    life.on(hang.0, start);
    assert_eq!(life.deadline(), Some(start + INSPECTION));
    assert_eq!(life.on(Event::TimePassed, start + INSPECTION), TERM);
    assert_eq!(life.deadline(), Some(start + INSPECTION + GRACE), "the grace begins with TERM");
}

#[test]
fn term_comes_before_kill() {
    let (mut life, start) = (life(0), Instant::now());
    assert_eq!(life.on(killed(1, SIGSEGV), start), TERM);
    assert_eq!(life.on(Event::TimePassed, start + GRACE / 2), None);
    assert_eq!(life.on(Event::TimePassed, start + GRACE), Some(Order::Kill));
    assert_eq!(life.on(Event::TimePassed, start + GRACE), None, "once");
    let late = start + GRACE + KILL_PATIENCE;
    assert_eq!(life.on(Event::TimePassed, late), Some(Order::Abandon));
    assert_eq!(life.deadline(), None);
    let exit = Exit::Signal(SIGSEGV);
    assert_eq!(life.cause(), Some(Cause::Failure { rank: 1, exit }));
    assert_eq!(life.on(GONE, late), None, "what cannot be killed holds its GPU");
}

#[test]
fn signals_are_handed_on_and_a_second_int_kills() {
    let events = [
        (Event::Signalled(SIGTERM), TERM),
        (Event::Signalled(SIGHUP), HUP),
        (killed(0, SIGTERM), None),
        (Event::Signalled(SIGINT), Some(Order::Kill)),
        (Event::Signalled(SIGINT), None),
        (GONE, None),
    ];
    check(5, &events, 143);
}

#[test]
fn a_closed_output_ends_the_job_like_sigpipe() {
    check(5, &[(Event::OutputClosed, TERM), (Event::OutputClosed, None), (GONE, None)], 141);
}

#[test]
fn an_endless_grace_has_no_deadline() {
    let mut life = Lifecycle::new(Duration::MAX, INSPECTION, SIGTERM, Restarts::new(0));
    life.on(Event::Signalled(SIGINT), Instant::now());
    assert_eq!(life.deadline(), None);
}

#[test]
fn workers_that_are_asked_to_make_room_save_and_end() {
    let asked = (Event::PreemptionAsked(SIGUSR1), Some(Order::Ask(SIGUSR1)));
    let again = (Event::PreemptionAsked(SIGUSR1), None);
    let saved = |rank| (ended(rank, 41), None);
    check(5, &[asked, again, saved(0), saved(1), (GONE, None)], 41);
    // A scheduler's TERM at the end of its patience does not interrupt them.
    check(0, &[asked, (Event::Signalled(SIGTERM), None), saved(1), saved(0), (GONE, None)], 41);
    check(0, &[asked, (Event::Signalled(SIGINT), Some(Order::Kill))], 138);
    let int = (Event::PreemptionAsked(SIGINT), Some(Order::Ask(SIGINT)));
    let second = (Event::PreemptionAsked(SIGINT), Some(Order::Kill));
    check(0, &[int, second], 130);
    check(0, &[int, (ended(1, 5), HUP), second], 5);
    check(0, &[asked, (ended(0, 0), None), (ended(1, 0), None), (GONE, None)], 0);
    // Srun sends the signal to the workers, and not to us.
    check(5, &[saved(1), saved(0), (GONE, None)], 41);
    // A program that knows nothing of it, and one that fails over it: to who saves TERM does nothing.
    check(5, &[asked, (killed(0, SIGUSR1), TERM), (killed(1, SIGUSR1), None), (GONE, None)], 138);
    check(0, &[asked, (ended(1, 4), HUP), (ended(0, 1), None), (GONE, None)], 4);
}

#[test]
fn who_does_not_save_in_time_is_killed() {
    let (mut life, now) = (life(3), Instant::now());
    life.on(Event::PreemptionAsked(SIGUSR1), now);
    assert_eq!(life.on(Event::TimePassed, now + GRACE), Some(Order::Kill));
    assert_eq!(life.on(killed(0, libc::SIGKILL), now + GRACE), None);
    assert_eq!(life.on(GONE, now + GRACE), None);
    assert_eq!(life.exit_code(), 138);
}

#[test]
fn the_grace_of_a_request_to_make_room_does_not_begin_anew() {
    let failed = Event::PeerEnds(Cause::NodeLost { node: 1 });
    for (event, order) in [(ended(0, 4), HUP), (killed(0, SIGUSR1), TERM), (failed, HUP)] {
        let (mut life, asked) = (life(3), Instant::now());
        life.on(Event::PreemptionAsked(SIGUSR1), asked);
        assert_eq!(life.on(event, asked + GRACE / 2), order, "{event:?}");
        assert_eq!(life.on(Event::TimePassed, asked + GRACE), Some(Order::Kill), "{event:?}");
    }
}

#[test]
fn where_term_asks_to_make_room_another_signal_ends() {
    let asked = (Event::PreemptionAsked(SIGTERM), Some(Order::Ask(SIGTERM)));
    let (now, hang) = (Instant::now(), Event::Hung { rank: None });
    let lost = Event::PeerEnds(Cause::NodeLost { node: 1 });
    for (events, code) in [
        (vec![(ended(1, 3), HUP), (killed(0, SIGHUP), None)], 3),
        (vec![(hang, Some(Order::Inspect)), (Event::Inspected, HUP)], 40),
        (vec![(Event::OutputClosed, HUP)], 141),
        (vec![(lost, HUP)], 44),
        (vec![asked, (killed(1, SIGTERM), HUP), (killed(0, SIGHUP), None)], 143),
        (vec![asked, (ended(1, 4), HUP), (killed(0, SIGHUP), None)], 4),
    ] {
        let mut life = Lifecycle::new(GRACE, INSPECTION, SIGHUP, Restarts::new(0));
        for &(event, order) in &events {
            assert_eq!(life.on(event, now), order, "{event:?} of {events:?}");
        }
        assert_eq!(life.exit_code(), code, "{events:?}");
    }
}

#[test]
fn a_checkpoint_that_one_rank_did_not_save_is_none() {
    let asked = (Event::PreemptionAsked(SIGUSR1), Some(Order::Ask(SIGUSR1)));
    let (saved, kill) = ((ended(0, 41), None), (Event::Signalled(SIGINT), Some(Order::Kill)));
    check(3, &[asked, saved, kill, (killed(1, libc::SIGKILL), None), (GONE, None)], 138);
    check(3, &[asked, saved, (killed(1, SIGUSR1), TERM), (GONE, None)], 138);
    check(3, &[asked, (ended(1, 0), None), saved, (GONE, None)], 41);
    check(3, &[saved, kill, (killed(1, libc::SIGKILL), None), (GONE, None)], 137);
}

#[test]
fn a_failure_is_restarted_until_there_are_none_left() {
    let fails = (ended(1, 3), TERM);
    let again = |number| (GONE, Some(Order::Restart(number)));
    check(2, &[fails, again(1), fails, again(2), fails, (GONE, None)], 42);
    check(2, &[fails, again(1), (ended(0, 0), None), (ended(1, 0), None), (GONE, None)], 0);
    check(2, &[(ended(1, 2), TERM), (GONE, None)], 2);
    check(2, &[fails, again(1), (ended(0, 43), TERM), (GONE, None)], 43);
}

#[test]
fn what_happens_on_another_node_happens_here() {
    let lost = Cause::NodeLost { node: 1 };
    let failed = Cause::Failure { rank: 5, exit: Exit::Code(9) };
    let settled = |cause, has_saved, was_stopped, is_final| {
        let (cause, called_off) = (Some(cause), None);
        (Event::Settled { cause, has_saved, was_stopped, is_final, called_off }, None)
    };
    let ends = |cause| (Event::PeerEnds(cause), TERM);
    // The first cause of all replaces what this node saw first.
    let events = [(ended(0, 1), TERM), settled(failed, false, true, false), (GONE, None)];
    check(0, &events, 9);
    check(3, &[ends(lost), settled(lost, false, true, true), (GONE, None)], 44);
    let again = (GONE, Some(Order::Restart(1)));
    let events = [ends(failed), settled(failed, false, true, false), again];
    check(1, &events, 0);
    let asked = Cause::Preempted { signal: Some(SIGUSR1) };
    let ask = (Event::PeerEnds(asked), Some(Order::Ask(SIGUSR1)));
    check(3, &[ask, (ended(0, 41), None), settled(asked, true, false, false), (GONE, None)], 41);
    let ends_saving = (Event::PeerEnds(failed), HUP);
    check(3, &[ask, ends_saving, settled(failed, true, true, true), (GONE, None)], 9);
    let int = Cause::Signal(SIGINT);
    let events = [
        (Event::PeerEnds(int), Some(Order::Signal(SIGINT))),
        (Event::PeerEnds(int), None),
        (Event::PeerKills, Some(Order::Kill)),
        (Event::PeerKills, None),
        settled(int, false, true, false),
        (GONE, None),
    ];
    check(3, &events, 130);
}

#[test]
fn what_is_asked_for_while_a_failed_attempt_ends_is_not_forgotten() {
    let (fails, hangs) = ((ended(1, 3), TERM), (Event::Hung { rank: None }, Some(Order::Inspect)));
    let term = (Event::Signalled(SIGTERM), TERM);
    let asked = (Event::PreemptionAsked(SIGUSR1), None);
    let closed = (Event::OutputClosed, None);
    let gone = (GONE, None);
    for (request, code) in [(term, 143), (asked, 138), (closed, 141)] {
        check(3, &[fails, request, gone], code);
        check(0, &[fails, request, gone], 3);
        check(3, &[(ended(1, 2), TERM), request, gone], 2);
        check(3, &[hangs, request, (ended(0, 1), None), gone], code);
        let killed = (Event::PeerKills, Some(Order::Kill));
        let request = (request.0, request.1.filter(|_| false));
        check(3, &[fails, killed, request, gone], code);
    }
    check(3, &[fails, closed, term, gone], 141);
    // A rank that fails while all save: that was asked for before.
    let ask = (asked.0, Some(Order::Ask(SIGUSR1)));
    check(3, &[ask, (ended(1, 4), HUP), (ended(0, 41), None), gone], 4);
    let by_itself = (ended(0, 41), None);
    check(3, &[by_itself, (ended(1, 3), HUP), gone], 3);
    // On another node.
    let (failed, by) =
        (Cause::Failure { rank: 5, exit: Exit::Code(9) }, Some(Cause::Signal(SIGTERM)));
    let settled = Event::Settled {
        cause: Some(failed),
        has_saved: false,
        was_stopped: true,
        is_final: false,
        called_off: by,
    };
    check(3, &[(Event::PeerEnds(failed), TERM), (settled, None), gone], 143);
}

#[test]
fn exits_read_well() {
    assert_eq!(Exit::Code(3).to_string(), "exited with code 3");
    assert_eq!(Exit::Signal(11).to_string(), "was killed by SIGSEGV (exit code 139)");
}
