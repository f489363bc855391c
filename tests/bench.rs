//! `rodizio bench` from outside: every measurement runs and tells everything that it promises.

use std::process::{Command, Output};
use std::sync::mpsc::channel;
use std::thread;
use std::time::Duration;

use rodizio::broker::{Broker, BrokerConfig};
use serde_json::Value;
use tokio::net::TcpSocket;

/// A measurement ends within this, or never.
const LIMIT: Duration = Duration::from_secs(600);

fn bench(args: &str) -> Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_rodizio"));
    command.arg("bench").args(args.split(' ')).env_remove("RODIZIO_LOG");
    let (sender, receiver) = channel();
    thread::spawn(move || sender.send(command.output()));
    let output = receiver.recv_timeout(LIMIT).unwrap_or_else(|_| panic!("bench {args} does not end"));
    output.expect("cargo built the program before this test")
}

fn measured(args: &str) -> Value {
    let output = bench(&format!("{args} --json --quiet"));
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success() && stderr.is_empty(), "bench {args}: {stderr}");
    serde_json::from_slice(&output.stdout).expect("one JSON document")
}

/// The number at a path of keys.
fn number(result: &Value, path: &str) -> f64 {
    let value = path.split('.').fold(result, |value, key| &value[key]);
    value.as_f64().unwrap_or_else(|| panic!("{path} is {value}"))
}

fn assert_positive(result: &Value, paths: &[&str]) {
    for path in paths {
        let found = number(result, path);
        assert!(found > 0.0 && found.is_finite(), "{path} is {found}");
    }
}

fn assert_roles(result: &Value, expected: &[(&str, u64)]) {
    let roles: Vec<_> = result["roles"]
        .as_array()
        .expect("a list")
        .iter()
        .map(|role| (role["role"].as_str().expect("a word"), role["count"].as_u64().expect("a count")))
        .collect();
    assert_eq!(roles, expected);
    if cfg!(target_os = "linux") {
        for role in result["roles"].as_array().expect("a list") {
            assert!(role["cpu_seconds"].as_f64() >= Some(0.0), "{role}");
            assert!(role["peak_rss_bytes"].as_u64() > Some(1 << 20), "{role}");
        }
    }
}

const OF_TRANSFER: &[&str] = &[
    "seconds.total",
    "seconds.pull",
    "seconds.fastest",
    "seconds.slowest",
    "mb_per_s",
    "pipe.seconds",
    "pipe.mb_per_s",
    "pipe_qos1.mb_per_s",
    "pipe_rumqttd.mb_per_s",
    "machine.tcp_mb_per_s",
    "machine.memory_copy_mb_per_s",
    "ratio.to_pipe",
    "ratio.pull_to_pipe",
    "ratio.to_pipe_qos1",
    "ratio.to_pipe_rumqttd",
    "ratio.to_tcp",
    "ratio.to_memory_copy",
];

/// What a transfer of `args` tells; the counts of senders and receivers, and what is sent and received in models.
fn assert_transfer(args: &str, [senders, receivers]: [u64; 2], sent: f64, received: f64) -> Value {
    let result = measured(&format!("transfer --chunk-bytes 16KiB --repeat 2 {args}"));
    assert_positive(&result, OF_TRANSFER);
    assert!(number(&result, "seconds.verify") >= 0.0);
    assert_eq!((result["bench"].as_str(), result["broker"].as_str()), (Some("transfer"), Some("embedded")));
    for (key, expected) in [("senders", senders), ("receivers", receivers), ("repeat", 2), ("chunk_bytes", 16 << 10)] {
        assert_eq!(result[key].as_u64(), Some(expected), "{key}");
    }
    // Headers and grants come on top, and a chunk that a busy machine delayed may come twice.
    let (found_sent, found_received) =
        (number(&result, "wire.sent_per_model"), number(&result, "wire.received_per_model"));
    assert!(found_sent >= sent && found_received >= received, "{found_sent} sent, {found_received} received");
    assert!(number(&result, "wire.sent_bytes") > 0.0 && number(&result, "wire.received_bytes") > 0.0);
    for key in ["count", "median_ms", "p99_ms", "max_ms"] {
        assert!(number(&result["heartbeat"], key) >= 0.0, "{key}");
    }
    result
}

#[test]
fn a_broadcast_sends_once_and_is_received_by_all() {
    let result = assert_transfer("--bytes 300KB --receivers 3", [1, 3], 1.0, 3.0);
    assert_eq!(result["processes"], true);
    assert_roles(&result, &[("sender", 1), ("receiver", 3), ("broker", 1)]);
}

#[test]
fn a_gather_receives_from_everybody_and_may_run_in_one_process() {
    // More senders than are pulled from at a time.
    let result = assert_transfer("--bytes 2100KB --senders 6 --processes=false", [6, 1], 6.0, 6.0);
    assert_eq!(result["processes"], false);
    assert_roles(&result, &[("process", 1)]);
}

#[test]
fn a_blob_is_rounded_up_to_whole_values() {
    let result = measured("transfer --bytes 1 --chunk-bytes 1KiB --repeat 1 --processes=false");
    assert_eq!(result["bytes"], 4);
}

#[test]
fn beside_a_broker_that_is_given_there_is_only_the_pipe_through_it() {
    let runtime = tokio::runtime::Runtime::new().unwrap();
    let broker = runtime.block_on(Broker::start(BrokerConfig::default())).unwrap();
    let args = "transfer --bytes 100KB --chunk-bytes 16KiB --repeat 1 --processes=false";
    let result = measured(&format!("{args} --broker {}", broker.addr()));
    assert_positive(&result, &["pipe.mb_per_s", "ratio.to_pipe"]);
    for (of, keys) in
        [(&result, ["pipe_qos1", "pipe_rumqttd"]), (&result["ratio"], ["to_pipe_qos1", "to_pipe_rumqttd"])]
    {
        assert!(keys.iter().all(|key| of.as_object().unwrap()[*key].is_null()), "{of}");
    }
}

const OF_ROUND: &[&str] = &[
    "seconds.total",
    "fastest",
    "slowest",
    "mb_per_s",
    "machine.tcp_mb_per_s",
    "machine.memory_copy_mb_per_s",
    "ratio.to_tcp",
    "ratio.to_memory_copy",
    "heartbeat.count",
    "heartbeat.p99_ms",
];

fn assert_round(args: &str, peers: f64) -> Value {
    let result = measured(&format!("round --bytes 200KB --chunk-bytes 16KiB --rounds 2 {args}"));
    assert_positive(&result, OF_ROUND);
    for phase in ["evaluate", "elect", "train", "gather", "aggregate", "broadcast", "commit"] {
        assert!(number(&result["seconds"], phase) >= 0.0, "{phase}");
    }
    assert_eq!((result["bench"].as_str(), result["broker"].as_str()), (Some("round"), Some("embedded")));
    assert_eq!((number(&result, "peers"), number(&result, "rounds")), (peers, 2.0));
    // An update of each trainer, and the new model; the leader receives the updates, each trainer the model, however late.
    assert!(number(&result, "wire.sent_per_model") >= peers, "{result}");
    assert!(number(&result, "wire.received_per_model") >= 2.0 * (peers - 1.0), "{result}");
    result
}

#[test]
fn rounds_are_measured_with_a_process_for_each_peer_and_leave_nothing_behind() {
    let dir = tempfile::tempdir().unwrap();
    let result = assert_round(&format!("--peers 3 --dir {}", dir.path().display()), 3.0);
    assert_eq!((&result["processes"], &result["disk"]), (&Value::Bool(true), &Value::Bool(true)));
    assert_roles(&result, &[("leader", 1), ("trainer", 2), ("broker", 1)]);
    assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 0);
}

#[test]
fn rounds_are_measured_in_one_process_and_in_memory() {
    let result = assert_round("--peers 3 --memory --processes=false", 3.0);
    assert_eq!((&result["processes"], &result["disk"]), (&Value::Bool(false), &Value::Bool(false)));
    assert_roles(&result, &[("process", 1)]);
}

#[test]
fn codecs_halve_and_quarter_what_a_round_sends_and_topk_sends_next_to_no_updates() {
    // An update of each of two trainers, and the new model; messages without weights take as much whatever the codec.
    let expected = [
        ("--codec f32", 3.0, 3.06),
        ("--codec f16 --model-codec f16", 1.5, 1.53),
        ("--codec bf16 --model-codec bf16", 1.5, 1.53),
        ("--codec int8 --model-codec int8", 0.75, 0.765),
        ("--codec topk", 1.0, 1.06),
    ];
    // A model has no more chunks than a receiver keeps that does not know of the model yet.
    let args = "round --bytes 2MB --chunk-bytes 256KiB --rounds 2 --peers 3 --memory --processes=false";
    for (codecs, least, most) in expected {
        // What is lost on a busy machine is sent again: one run in which nothing was shows what the codec needs.
        let mut seen = Vec::new();
        let fits = |_| {
            seen.push(number(&measured(&format!("{args} {codecs}")), "wire.sent_per_model"));
            (least..most).contains(seen.last().unwrap())
        };
        assert!((0..10).any(fits), "{codecs}: {seen:?}");
    }
}

#[test]
fn the_table_is_for_people() {
    let output = bench("transfer --bytes 100KB --chunk-bytes 16KiB --repeat 1 --processes=false");
    let (stdout, stderr) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    let pipes = ["bare pipe ", "pipe at QoS 1 ", "pipe of rumqttd "];
    let names = ["transfer ", "seconds ", "speed ", "TCP over loopback ", "copy in memory ", "wire ", "heartbeat "];
    for name in names.iter().chain(&pipes).chain(&["process "]) {
        assert!(stdout.lines().any(|line| line.starts_with(name)), "no {name}in\n{stdout}");
    }
    assert_eq!(stderr, "measuring transfer 1 of 1\n");
}

#[test]
fn what_cannot_be_measured_is_refused_with_a_hint() {
    let refused = |args: &str, exit: i32, said: &str| {
        let output = bench(args);
        let stderr = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(exit), "{args}: {stderr}");
        assert!(stderr.contains(said) && stderr.contains("hint: "), "{args}: {stderr}");
        assert!(output.stdout.is_empty());
    };
    refused("transfer --bytes 0", 2, "a size from 1 to");
    refused("round --peers 2", 2, "--peers");
    refused("round --codec f64", 2, "is no codec");
    refused("round --model-codec topk", 2, "topk is for updates");
    if cfg!(target_os = "linux") {
        refused("round --bytes 900GB", 2, "4 peers take about");
    }
    // The port is taken, and nobody listens.
    let socket = TcpSocket::new_v4().unwrap();
    socket.bind("127.0.0.1:0".parse().unwrap()).unwrap();
    let addr = socket.local_addr().unwrap();
    refused(&format!("transfer --bytes 4 --processes=false --broker {addr}"), 3, "127.0.0.1");
}
