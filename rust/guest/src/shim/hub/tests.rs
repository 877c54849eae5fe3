//! The hub without any descriptor but its logs: what comes of what happens, in an order that no peer is needed for.

use serde_json::{Value, json};

use super::{Hub, Order, PANIC_GRACE_MS};
use crate::protocol::{Broken, Decoder, Frame, Kind, MAIN_STREAM, WINDOW_BYTES};
use crate::shim::clients::ClientId;
use crate::shim::config::{Config, tests::sample};
use crate::shim::sink::{ConsoleLog, Log, Old, Sink};
use crate::shim::verdict::{Cause, End, MainState};

const CLIENT: ClientId = 7;
const OK: &[u8] = br#"{"ok":{"pid":1}}"#;
const EXIT: &[u8] = br#"{"code":0,"signal":null,"out_of_memory":false}"#;

fn hub() -> Hub {
    let nowhere = || Sink::open("/dev/null", 0, Old::Dropped).expect("it is always there");
    let config = Config::parse(sample().to_string().as_bytes()).expect("it is right");
    let mut hub = Hub::new(config, 1, Log(nowhere()), ConsoleLog(nowhere()), 0);
    hub.begin_channel();
    hub.add_client(CLIENT);
    hub
}

/// One whose guest has answered.
fn running(main: &str) -> Hub {
    let mut hub = hub();
    tell(&mut hub, Kind::Hello, 0, json!({"version": 1, "main": main}).to_string().as_bytes()).expect("it is in order");
    said(&mut hub);
    hub
}

fn tell(hub: &mut Hub, kind: Kind, stream: u32, payload: &[u8]) -> Result<(), Broken> {
    hub.on_guest_frame(&Frame { kind, stream, payload: payload.to_vec() })
}

fn ask(hub: &mut Hub, stream: u32, request: &Value) {
    hub.on_client_frame(CLIENT, Frame { kind: Kind::Request, stream, payload: request.to_string().into_bytes() }).expect("it is in order");
}

fn frames(bytes: &[u8]) -> Vec<Frame> {
    let mut decoder = Decoder::default();
    decoder.feed(bytes);
    std::iter::from_fn(|| decoder.next_frame().expect("they are frames")).collect()
}

/// What was sent to the guest.
fn said(hub: &mut Hub) -> Vec<(Kind, u32)> {
    let found = frames(&hub.guest.queue.to_bytes());
    hub.guest.queue.clear();
    found.into_iter().map(|frame| (frame.kind, frame.stream)).collect()
}

/// What was sent to the client.
fn told(hub: &mut Hub) -> Vec<Frame> {
    let queue = &mut hub.clients.get_mut(&CLIENT).expect("it is there").queue;
    let found = frames(&queue.to_bytes());
    queue.clear();
    found
}

fn advance(hub: &mut Hub, to_ms: u64) {
    while let Some(due_ms) = hub.next_ms().filter(|due_ms| *due_ms <= to_ms) {
        hub.now_ms = due_ms;
        hub.tick();
    }
    hub.now_ms = to_ms;
}

#[test]
fn what_comes_before_the_hello_is_of_another_time() {
    let mut hub = hub();
    assert_eq!(said(&mut hub), [(Kind::Hello, 0)]);
    assert_eq!(tell(&mut hub, Kind::Stdout, 99, b"x"), Ok(()));
    assert_eq!(tell(&mut hub, Kind::Hello, 0, br#"{"version": 2}"#), Err(Broken("a hello of another version")));
    assert_eq!(tell(&mut hub, Kind::Hello, 0, br#"{"version": 1}"#), Ok(()));
    assert_eq!(tell(&mut hub, Kind::Hello, 0, br#"{"version": 1}"#), Err(Broken("a frame that the channel itself does not have")));
    assert!(tell(&mut hub, Kind::Stdout, 99, b"x").is_err());
}

#[test]
fn a_guest_that_does_not_speak_in_time_is_killed_once() {
    let mut hub = hub();
    advance(&mut hub, 59_999);
    assert_eq!(hub.orders, []);
    advance(&mut hub, 600_000);
    assert_eq!(hub.orders, [Order::Kill]);
    assert_eq!(hub.life.cause, Some(Cause::BootTimeout(60_000)));
}

#[test]
fn a_machine_restored_at_work_is_attached_without_a_start() {
    let mut hub = running("running");
    assert_eq!(hub.main.state, MainState::Running);
    ask(&mut hub, 1, &json!({"op": "attach", "stdin": false}));
    tell(&mut hub, Kind::Stdout, MAIN_STREAM, b"still here").expect("it is in order");
    tell(&mut hub, Kind::Exit, MAIN_STREAM, EXIT).expect("it is in order");
    assert_eq!(told(&mut hub).iter().map(|frame| frame.kind).collect::<Vec<_>>(), [Kind::Response, Kind::Stdout, Kind::Exit]);
    assert_eq!(said(&mut hub), [(Kind::Request, 2)]); // poweroff
    assert_eq!(hub.life.cause, Some(Cause::Command));
}

#[test]
fn a_machine_restored_after_its_end_ends() {
    let mut hub = running("exited");
    tell(&mut hub, Kind::Exit, MAIN_STREAM, EXIT).expect("it is in order");
    assert_eq!((hub.main.state, &hub.life.cause), (MainState::Exited, &Some(Cause::Command)));
    assert_eq!(tell(&mut hub, Kind::Exit, MAIN_STREAM, EXIT), Ok(()));
    assert!(tell(&mut hub, Kind::Stdout, MAIN_STREAM, b"x").is_err());
}

#[test]
fn the_main_command_may_not_speak_before_its_response() {
    let mut hub = running("none");
    ask(&mut hub, 1, &json!({"op": "start", "argv": ["x"]}));
    assert_eq!(said(&mut hub), [(Kind::Request, MAIN_STREAM)]);
    assert!(tell(&mut hub, Kind::Stdout, MAIN_STREAM, b"x").is_err());
    assert_eq!(tell(&mut hub, Kind::Response, MAIN_STREAM, OK), Ok(()));
    assert_eq!(tell(&mut hub, Kind::Stdout, MAIN_STREAM, b"x"), Ok(()));
    assert_eq!(tell(&mut hub, Kind::Response, MAIN_STREAM, OK), Err(Broken("a response that nobody asked for")));
}

#[test]
fn a_lost_channel_answers_who_waits_and_the_next_hello_says_what_became_of_the_start() {
    let mut hub = running("none");
    ask(&mut hub, 1, &json!({"op": "start", "argv": ["x"]}));
    ask(&mut hub, 2, &json!({"op": "sync"}));
    hub.begin_channel();
    assert_eq!(
        told(&mut hub).iter().map(|frame| (frame.kind, frame.stream)).collect::<Vec<_>>(),
        [(Kind::Response, 2), (Kind::Response, 1)]
    );
    assert_eq!(hub.main.state, MainState::Running);
    tell(&mut hub, Kind::Hello, 0, br#"{"version": 1, "main": "none"}"#).expect("it is in order");
    assert_eq!(hub.main.state, MainState::None);
}

#[test]
fn while_a_client_lags_the_command_is_granted_nothing() {
    let mut hub = running("running");
    ask(&mut hub, 1, &json!({"op": "attach"}));
    let piece = vec![0; 65_536];
    for _ in 0..4 {
        tell(&mut hub, Kind::Stdout, MAIN_STREAM, &piece).expect("it is granted");
    }
    assert_eq!(said(&mut hub), vec![(Kind::Credit, MAIN_STREAM); 4]);
    for _ in 0..4 {
        tell(&mut hub, Kind::Stdout, MAIN_STREAM, &piece).expect("it is granted");
    }
    assert_eq!(said(&mut hub), []);
    assert_eq!(tell(&mut hub, Kind::Stdout, MAIN_STREAM, b"x"), Err(Broken("more bytes than were granted")));
    advance(&mut hub, super::super::feed::GRACE_MS);
    assert_eq!(told(&mut hub).last().map(|frame| frame.kind), Some(Kind::Close));
    assert_eq!(said(&mut hub), [(Kind::Credit, MAIN_STREAM)]);
    tell(&mut hub, Kind::Stdout, MAIN_STREAM, &piece).expect("it is granted");
}

#[test]
fn what_is_typed_waits_for_the_start_and_for_credit() {
    let mut hub = running("none");
    ask(&mut hub, 1, &json!({"op": "attach", "stdin": true}));
    told(&mut hub);
    for _ in 0..WINDOW_BYTES / 65_536 {
        hub.on_client_frame(CLIENT, Frame { kind: Kind::Stdin, stream: 1, payload: vec![0; 65_536] }).expect("it is granted");
    }
    assert!(hub.on_client_frame(CLIENT, Frame { kind: Kind::Stdin, stream: 1, payload: vec![0] }).is_err());
    assert_eq!(said(&mut hub), []);
    ask(&mut hub, 2, &json!({"op": "start", "argv": ["x"]}));
    tell(&mut hub, Kind::Response, MAIN_STREAM, OK).expect("it is in order");
    assert_eq!(said(&mut hub).iter().filter(|(kind, _)| *kind == Kind::Stdin).count(), 4);
    hub.on_client_frame(CLIENT, Frame { kind: Kind::Stdin, stream: 1, payload: vec![0; 10] }).expect("it was granted anew");
    assert_eq!(said(&mut hub), []);
    tell(&mut hub, Kind::Credit, MAIN_STREAM, &10_u32.to_le_bytes()).expect("it is in order");
    assert_eq!(said(&mut hub), [(Kind::Stdin, MAIN_STREAM)]);
}

#[test]
fn a_panic_kills_unless_the_guest_answers_what_was_asked_after_it() {
    for is_alive in [false, true] {
        let mut hub = running("running");
        hub.on_console(b"Kernel panic - not syncing: x\n", false);
        assert_eq!(said(&mut hub), [(Kind::Ping, 0)]);
        tell(&mut hub, Kind::Stdout, MAIN_STREAM, b"said before").expect("it is in order");
        if is_alive {
            tell(&mut hub, Kind::Pong, 0, &1_u64.to_le_bytes()).expect("it is in order");
        }
        advance(&mut hub, PANIC_GRACE_MS);
        assert_eq!(hub.orders.is_empty(), is_alive);
        assert_eq!(hub.panic_text(), if is_alive { None } else { Some("x") });
    }
}

#[test]
fn the_first_cause_is_told_and_the_shorter_time_counts() {
    let mut hub = running("running");
    tell(&mut hub, Kind::Exit, MAIN_STREAM, EXIT).expect("it is in order");
    ask(&mut hub, 1, &json!({"op": "stop", "timeout_s": 0.5}));
    advance(&mut hub, 499);
    assert_eq!(hub.orders, []);
    advance(&mut hub, 500);
    assert_eq!((&hub.orders[..], &hub.life.cause), (&[Order::Kill][..], &Some(Cause::Command)));
}

#[test]
fn metrics_are_asked_for_once_a_second_and_not_waited_for_longer() {
    let mut hub = running("running");
    assert!(hub.ask_metrics() && hub.ask_metrics());
    assert_eq!(said(&mut hub), [(Kind::Request, 2)]);
    tell(&mut hub, Kind::Response, 2, br#"{"ok":{"load1":1}}"#).expect("it is in order");
    assert!(!hub.ask_metrics());
    assert_eq!(hub.fresh_metrics(), Some(&json!({"load1": 1})));
    advance(&mut hub, 1000);
    assert!(hub.ask_metrics());
    assert_eq!(hub.fresh_metrics(), None);
    advance(&mut hub, 2000);
    assert!(!hub.is_awaiting_metrics() && hub.fresh_metrics().is_none());
    assert_eq!(tell(&mut hub, Kind::Response, 3, br#"{"ok":{"load1":2}}"#), Ok(()));
    assert_eq!(hub.fresh_metrics(), None);
}

#[test]
fn at_the_end_everybody_is_answered() {
    let mut hub = running("running");
    for (stream, op) in [(1, "attach"), (2, "watch"), (3, "exec"), (4, "console")] {
        ask(&mut hub, stream, &json!({"op": op}));
    }
    told(&mut hub);
    hub.on_end(End { code: Some(137), why: "w".into(), kind: "vmm_killed", out_of_memory: false });
    let found: Vec<_> = told(&mut hub).iter().map(|frame| (frame.kind, frame.stream)).collect();
    assert_eq!(found, [(Kind::Response, 3), (Kind::Exit, 1), (Kind::Close, 2)]);
    ask(&mut hub, 9, &json!({"op": "ready"}));
    assert!(String::from_utf8_lossy(&told(&mut hub)[0].payload).contains("the machine has ended: w"));
}

/// Whatever both sides say, the hub neither breaks nor grows: sums that overflow are errors in this build.
#[test]
fn nonsense_from_both_sides_harms_nobody() {
    let mut state = 0x2545_F491_4F6C_DD1D_u64;
    let mut draw = |below: u64| {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state % below
    };
    let requests =
        ["ready", "start", "attach", "signal", "console", "status", "hold", "stop", "watch", "exec", "archive", "extract", "sync"];
    let mut n_broken = 0;
    for _ in 0..300 {
        let mut hub = running(["none", "running", "exited"][usize::try_from(draw(3)).expect("it is small")]);
        for _ in 0..200 {
            let kind = Kind::of(u8::try_from(1 + draw(17)).expect("it is small")).expect("it is one");
            let stream = u32::try_from(draw(6)).expect("it is small");
            let n_bytes = usize::try_from([0, 1, 2, 4, 8, 65_536][usize::try_from(draw(6)).expect("it is small")]).expect("it is small");
            let payload = match draw(4) {
                0 => OK.to_vec(),
                1 => EXIT.to_vec(),
                2 => vec![255; n_bytes],
                _ => {
                    let op = requests[usize::try_from(draw(13)).expect("it is small")];
                    json!({"op": op, "stdin": true, "write": true, "signal": draw(70), "paused": draw(2) == 0}).to_string().into_bytes()
                }
            };
            let frame = Frame { kind, stream, payload };
            let is_broken = if draw(2) == 0 { hub.on_guest_frame(&frame).is_err() } else { hub.on_client_frame(CLIENT, frame).is_err() };
            n_broken += usize::from(is_broken);
            if draw(4) == 0 {
                hub.on_client_drained(CLIENT);
                told(&mut hub);
            }
            if draw(8) == 0 {
                said(&mut hub);
            }
            if draw(16) == 0 {
                let later_ms = hub.now_ms + draw(3000);
                advance(&mut hub, later_ms);
            }
            assert!(hub.guest.streams.len() <= 250 && hub.clients[&CLIENT].streams.len() <= 256);
        }
    }
    assert!(n_broken > 1000);
}

#[test]
fn clients_wait_for_a_guest_that_takes_no_more_but_not_while_it_is_paused() {
    let mut hub = running("none");
    hub.add_client(8);
    ask(&mut hub, 1, &json!({"op": "extract", "path": "/"}));
    for _ in 0..4 {
        hub.on_client_frame(CLIENT, Frame { kind: Kind::Data, stream: 1, payload: vec![0; 65_536] }).expect("it is granted");
    }
    assert!(!hub.reads_client(CLIENT) && hub.reads_client(8));
    hub.guest.heartbeat.hold(true, 0);
    assert!(hub.reads_client(CLIENT));
    assert!(hub.on_client_frame(CLIENT, Frame { kind: Kind::Data, stream: 1, payload: vec![0] }).is_err());
}
