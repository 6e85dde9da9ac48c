//! WebAssembly programs for the suite `wasm`, assembled from text, and an image with all of them.
//!
//! Rust's WASI targets are not on every machine that runs these tests; the text format needs one
//! crate. Each program does one thing.

mod components;
mod onnx;
mod sockets;

use std::collections::BTreeMap;
use std::path::Path;
use std::process::Command;
use std::sync::OnceLock;

/// Name of the image.
pub const IMAGE: &str = "localhost/wasm:latest";

/// What every module has: some of WASI preview 1, a memory, and `$say`, which writes a piece of
/// memory to a descriptor. Memory below 1024 is scratch.
const PRELUDE: &str = r#"
  (import "wasi_snapshot_preview1" "fd_write" (func $fd_write (param i32 i32 i32 i32) (result i32)))
  (import "wasi_snapshot_preview1" "fd_read" (func $fd_read (param i32 i32 i32 i32) (result i32)))
  (import "wasi_snapshot_preview1" "proc_exit" (func $proc_exit (param i32)))
  (import "wasi_snapshot_preview1" "args_sizes_get" (func $args_sizes (param i32 i32) (result i32)))
  (import "wasi_snapshot_preview1" "args_get" (func $args (param i32 i32) (result i32)))
  (import "wasi_snapshot_preview1" "environ_sizes_get" (func $environ_sizes (param i32 i32) (result i32)))
  (import "wasi_snapshot_preview1" "environ_get" (func $environ (param i32 i32) (result i32)))
  (import "wasi_snapshot_preview1" "random_get" (func $random (param i32 i32) (result i32)))
  (import "wasi_snapshot_preview1" "path_open" (func $path_open (param i32 i32 i32 i32 i32 i64 i64 i32 i32) (result i32)))
  (import "wasi_snapshot_preview1" "poll_oneoff" (func $poll (param i32 i32 i32 i32) (result i32)))
  (memory (export "memory") 2)
  (func $say (param $fd i32) (param $at i32) (param $len i32)
    (i32.store (i32.const 0) (local.get $at))
    (i32.store (i32.const 4) (local.get $len))
    (drop (call $fd_write (local.get $fd) (i32.const 0) (i32.const 1) (i32.const 8))))
"#;

/// Opens `$len` bytes of name at 1024 below the first preopened directory, with rights and flags;
/// exits with the error code.
const OPEN: &str = r#"
  (func $open (param $len i32) (param $flags i32) (param $rights i64) (result i32)
    (local $error i32)
    (local.set $error (call $path_open (i32.const 3) (i32.const 1) (i32.const 1024) (local.get $len)
      (local.get $flags) (local.get $rights) (i64.const 0) (i32.const 0) (i32.const 16)))
    (if (local.get $error) (then (call $proc_exit (local.get $error))))
    (i32.load (i32.const 16)))
  (func $copy (param $from i32) (param $to i32)
    (loop $more
      (i32.store (i32.const 0) (i32.const 2048))
      (i32.store (i32.const 4) (i32.const 4096))
      (if (call $fd_read (local.get $from) (i32.const 0) (i32.const 1) (i32.const 8))
        (then (call $proc_exit (i32.const 99))))
      (if (i32.load (i32.const 8)) (then
        (call $say (local.get $to) (i32.const 2048) (i32.load (i32.const 8)))
        (br $more)))))
"#;

fn module(body: &str) -> Vec<u8> {
    wat::parse_str(format!("(module {PRELUDE} {body})")).unwrap()
}

/// Reads the file that is named, and writes it to standard output.
fn reads(name: &str) -> Vec<u8> {
    let len = name.len();
    module(&format!(
        r#"{OPEN} (data (i32.const 1024) "{name}")
        (func (export "_start") (call $copy (call $open (i32.const {len}) (i32.const 0) (i64.const 2)) (i32.const 1)))"#
    ))
}

/// Writes `written` to the file that is named; exits with the error code when it may not.
fn writes(name: &str) -> Vec<u8> {
    let len = name.len();
    module(&format!(
        r#"{OPEN} (data (i32.const 1024) "{name}") (data (i32.const 1500) "written")
        (func (export "_start")
          (call $say (call $open (i32.const {len}) (i32.const 9) (i64.const 64)) (i32.const 1500) (i32.const 7)))"#
    ))
}

/// All strings of arguments or environment, each with its NUL.
fn strings(sizes: &str, get: &str) -> String {
    format!(
        r#"(func (export "_start")
          (drop (call ${sizes} (i32.const 16) (i32.const 20)))
          (drop (call ${get} (i32.const 1024) (i32.const 8192)))
          (call $say (i32.const 1) (i32.const 8192) (i32.load (i32.const 20))))"#
    )
}

/// A module with threads, which do `thread`, and a beginning.
fn threads(thread: &str, start: &str) -> Vec<u8> {
    let text = format!(
        r#"(module
          (import "wasi_snapshot_preview1" "proc_exit" (func $proc_exit (param i32)))
          (import "wasi" "thread-spawn" (func $spawn (param i32) (result i32)))
          (import "env" "memory" (memory 1 16 shared))
          (export "memory" (memory 0))
          (func (export "wasi_thread_start") (param $id i32) (param $argument i32) {thread})
          (func (export "_start") {start}))"#
    );
    wat::parse_str(text).unwrap()
}

/// A component whose `run` is this body.
fn command(body: &str) -> Vec<u8> {
    let text = format!(
        r#"(component
          (core module $m (func (export "run") (result i32) {body}))
          (core instance $i (instantiate $m))
          (func $run (result (result)) (canon lift (core func $i "run")))
          (instance $exports (export "run" (func $run)))
          (export "wasi:cli/run@0.2.0" (instance $exports)))"#
    );
    wat::parse_str(text).unwrap()
}

/// Loads a model by WASI-NN, asks it for what is twice 1.5 and 2, and says it; exits with the number
/// of an error.
fn infers(model: &[u8]) -> Vec<u8> {
    let text: String = model.iter().map(|byte| format!("\\{byte:02x}")).collect();
    let length = model.len();
    wat::parse_str(format!(
        r#"(module
          (import "wasi_snapshot_preview1" "fd_write" (func $fd_write (param i32 i32 i32 i32) (result i32)))
          (import "wasi_snapshot_preview1" "proc_exit" (func $proc_exit (param i32)))
          (import "wasi_ephemeral_nn" "load" (func $load (param i32 i32 i32 i32 i32) (result i32)))
          (import "wasi_ephemeral_nn" "init_execution_context" (func $context (param i32 i32) (result i32)))
          (import "wasi_ephemeral_nn" "set_input" (func $input (param i32 i32 i32) (result i32)))
          (import "wasi_ephemeral_nn" "compute" (func $compute (param i32) (result i32)))
          (import "wasi_ephemeral_nn" "get_output" (func $output (param i32 i32 i32 i32 i32) (result i32)))
          (memory (export "memory") 1)
          (data (i32.const 4096) "{text}")
          ;; One builder of the graph: where, and how long.
          (data (i32.const 16) "\00\10\00\00") (data (i32.const 20) "\{length:02x}\00\00\00")
          ;; A tensor: one dimension (2), of f32, 8 bytes.
          (data (i32.const 32) "\40\00\00\00\01\00\00\00\01\00\00\00\60\00\00\00\08\00\00\00")
          (data (i32.const 64) "\02\00\00\00")
          (func $check (param i32) (if (local.get 0) (then (call $proc_exit (local.get 0)))))
          (func $digit (param $at i32) (param $from i32)
            (i32.store8 (local.get $at)
              (i32.add (i32.const 48) (i32.trunc_f32_s (f32.load (local.get $from))))))
          (func (export "_start")
            (f32.store (i32.const 96) (f32.const 1.5))
            (f32.store (i32.const 100) (f32.const 2))
            ;; ONNX is 1, a processor 0.
            (call $check (call $load (i32.const 16) (i32.const 1) (i32.const 1) (i32.const 0) (i32.const 128)))
            (call $check (call $context (i32.load (i32.const 128)) (i32.const 132)))
            (call $check (call $input (i32.load (i32.const 132)) (i32.const 0) (i32.const 32)))
            (call $check (call $compute (i32.load (i32.const 132))))
            (call $check (call $output (i32.load (i32.const 132)) (i32.const 0) (i32.const 160) (i32.const 8) (i32.const 136)))
            (i32.store (i32.const 200) (i32.const 0x0a202020))
            (call $digit (i32.const 200) (i32.const 160))
            (call $digit (i32.const 202) (i32.const 164))
            (i32.store (i32.const 0) (i32.const 200))
            (i32.store (i32.const 4) (i32.const 4))
            (drop (call $fd_write (i32.const 1) (i32.const 0) (i32.const 1) (i32.const 8)))))"#
    ))
    .unwrap()
}

/// All programs by file name.
pub fn programs() -> BTreeMap<&'static str, Vec<u8>> {
    let hello = r#"
      (data (i32.const 1024) "hello from wasm\n") (data (i32.const 1100) "problem\n")
      (func (export "_start")
        (call $say (i32.const 1) (i32.const 1024) (i32.const 16))
        (call $say (i32.const 2) (i32.const 1100) (i32.const 8)))"#;
    // A second of the monotonic clock, again and again.
    let sleep = r#"
      (data (i32.const 1024) "ready\n")
      (func (export "_start")
        (call $say (i32.const 1) (i32.const 1024) (i32.const 6))
        (i32.store (i32.const 2064) (i32.const 1))
        (i64.store (i32.const 2072) (i64.const 1000000000))
        (loop $more
          (drop (call $poll (i32.const 2048) (i32.const 3072) (i32.const 1) (i32.const 16)))
          (br $more)))"#;
    // Grows by 1 MiB until it may not, says how many it has, as a byte of 'A' and so on.
    let grow = r#"
      (func (export "_start")
        (local $n i32)
        (loop $more
          (if (i32.ne (memory.grow (i32.const 16)) (i32.const -1)) (then
            (local.set $n (i32.add (local.get $n) (i32.const 1)))
            (br_if $more (i32.lt_u (local.get $n) (i32.const 120))))))
        (call $proc_exit (local.get $n)))"#;
    // Touches every page that it grows by.
    let eat = r#"
      (func (export "_start")
        (local $at i32)
        (loop $more
          (local.set $at (i32.mul (memory.size) (i32.const 65536)))
          (if (i32.eq (memory.grow (i32.const 16)) (i32.const -1)) (then (call $proc_exit (i32.const 5))))
          (memory.fill (local.get $at) (i32.const 1) (i32.const 1048576))
          (br $more)))"#;
    // Grows until it may not, says so, and asks every 50 ms until it may again.
    let again = r#"
      (data (i32.const 1024) "full\n") (data (i32.const 1040) "more\n")
      (func (export "_start")
        (loop $more (br_if $more (i32.ne (memory.grow (i32.const 16)) (i32.const -1))))
        (call $say (i32.const 1) (i32.const 1024) (i32.const 5))
        (i32.store (i32.const 2064) (i32.const 1))
        (i64.store (i32.const 2072) (i64.const 50000000))
        (loop $wait
          (drop (call $poll (i32.const 2048) (i32.const 3072) (i32.const 1) (i32.const 16)))
          (br_if $wait (i32.eq (memory.grow (i32.const 16)) (i32.const -1))))
        (call $say (i32.const 1) (i32.const 1040) (i32.const 5)))"#;
    // A second memory beside the first: each stays within a limit that both together do not.
    let two = r#"
      (memory $second 1)
      (func (export "_start")
        (local $n i32)
        (loop $more
          (drop (memory.grow (i32.const 16)))
          (drop (memory.grow $second (i32.const 16)))
          (memory.fill (i32.mul (local.get $n) (i32.const 1048576)) (i32.const 1) (i32.const 1048576))
          (memory.fill $second (i32.mul (local.get $n) (i32.const 1048576)) (i32.const 1) (i32.const 1048576))
          (local.set $n (i32.add (local.get $n) (i32.const 1)))
          (br_if $more (i32.lt_u (local.get $n) (i32.const 24)))))"#;
    let rand = r#"
      (func (export "_start")
        (drop (call $random (i32.const 1024) (i32.const 32)))
        (call $say (i32.const 1) (i32.const 1024) (i32.const 32)))"#;
    let many = r#"
      (func (export "_start")
        (local $n i32)
        (memory.fill (i32.const 1024) (i32.const 120) (i32.const 63))
        (i32.store8 (i32.const 1087) (i32.const 10))
        (loop $more
          (call $say (i32.const 1) (i32.const 1024) (i32.const 64))
          (local.set $n (i32.add (local.get $n) (i32.const 1)))
          (br_if $more (i32.lt_u (local.get $n) (i32.const 16384))))
        (call $proc_exit (i32.const 3)))"#;
    let simd = r#"
      (func (export "_start")
        (call $proc_exit (i32x4.extract_lane 2
          (i32x4.add (v128.const i32x4 1 2 3 4) (v128.const i32x4 10 20 30 40)))))"#;
    // Sends a line to port 9000 of the pod, by what WasmEdge adds to preview 1.
    let socket = r#"
      (import "wasi_snapshot_preview1" "sock_open" (func $open (param i32 i32 i32) (result i32)))
      (import "wasi_snapshot_preview1" "sock_connect" (func $connect (param i32 i32 i32) (result i32)))
      (import "wasi_snapshot_preview1" "sock_send" (func $send (param i32 i32 i32 i32 i32) (result i32)))
      (import "wasi_snapshot_preview1" "proc_exit" (func $proc_exit (param i32)))
      (memory (export "memory") 1)
      (data (i32.const 64) "\7f\00\00\01") (data (i32.const 128) "hello over a socket\n")
      (func $check (param i32) (if (local.get 0) (then (call $proc_exit (local.get 0)))))
      (func (export "_start")
        (call $check (call $open (i32.const 1) (i32.const 2) (i32.const 0)))
        (i32.store (i32.const 16) (i32.const 64)) (i32.store (i32.const 20) (i32.const 4))
        (call $check (call $connect (i32.load (i32.const 0)) (i32.const 16) (i32.const 9000)))
        (i32.store (i32.const 32) (i32.const 128)) (i32.store (i32.const 36) (i32.const 20))
        (call $check (call $send (i32.load (i32.const 0)) (i32.const 32) (i32.const 1) (i32.const 0) (i32.const 40))))"#;
    // For tests/bench/wasm.py: computes, and says how many nanoseconds that took.
    let compute = r#"
      (import "wasi_snapshot_preview1" "fd_write" (func $fd_write (param i32 i32 i32 i32) (result i32)))
      (import "wasi_snapshot_preview1" "clock_time_get" (func $clock (param i32 i64 i32) (result i32)))
      (memory (export "memory") 2)
      (func $now (result i64)
        (drop (call $clock (i32.const 1) (i64.const 1) (i32.const 16)))
        (i64.load (i32.const 16)))
      (func (export "_start")
        (local $n i32) (local $h i64) (local $time i64) (local $at i32)
        (local.set $time (call $now))
        (local.set $h (i64.const 88172645463325252))
        (loop $more
          (local.set $h (i64.xor (local.get $h) (i64.shl (local.get $h) (i64.const 13))))
          (local.set $h (i64.xor (local.get $h) (i64.shr_u (local.get $h) (i64.const 7))))
          (local.set $h (i64.xor (local.get $h) (i64.shl (local.get $h) (i64.const 17))))
          (local.set $at (i32.and (i32.wrap_i64 (local.get $h)) (i32.const 0xfff8)))
          (i64.store offset=65536 (local.get $at)
            (i64.add (i64.load offset=65536 (local.get $at)) (local.get $h)))
          (local.set $n (i32.add (local.get $n) (i32.const 1)))
          (br_if $more (i32.lt_u (local.get $n) (i32.const 300000000))))
        (local.set $time (i64.sub (call $now) (local.get $time)))
        (local.set $at (i32.const 1100))
        (i32.store8 (local.get $at) (i32.const 10))
        (loop $digit
          (local.set $at (i32.sub (local.get $at) (i32.const 1)))
          (i32.store8 (local.get $at)
            (i32.add (i32.const 48) (i32.wrap_i64 (i64.rem_u (local.get $time) (i64.const 10)))))
          (local.set $time (i64.div_u (local.get $time) (i64.const 10)))
          (br_if $digit (i64.ne (local.get $time) (i64.const 0))))
        (i32.store (i32.const 0) (local.get $at))
        (i32.store (i32.const 4) (i32.sub (i32.const 1101) (local.get $at)))
        (drop (call $fd_write (i32.const 1) (i32.const 0) (i32.const 1) (i32.const 8))))"#;
    let mut all = BTreeMap::from([
        ("compute.wasm", wat::parse_str(format!("(module {compute})")).unwrap()),
        ("simd.wasm", module(simd)),
        ("socket.wasm", wat::parse_str(format!("(module {socket})")).unwrap()),
        // Four threads, whose arguments are summed up.
        (
            "threads.wasm",
            threads(
                r#"(drop (i32.atomic.rmw.add (i32.const 64) (local.get $argument)))
                   (drop (i32.atomic.rmw.add (i32.const 68) (i32.const 1)))
                   (drop (memory.atomic.notify (i32.const 68) (i32.const 1)))"#,
                r#"(local $n i32)
                   (loop $more
                     (local.set $n (i32.add (local.get $n) (i32.const 1)))
                     (if (i32.lt_s (call $spawn (local.get $n)) (i32.const 0)) (then (call $proc_exit (i32.const 99))))
                     (br_if $more (i32.lt_u (local.get $n) (i32.const 4))))
                   (loop $wait
                     (local.set $n (i32.atomic.load (i32.const 68)))
                     (if (i32.lt_u (local.get $n) (i32.const 4)) (then
                       (drop (memory.atomic.wait32 (i32.const 68) (local.get $n) (i64.const 1000000000)))
                       (br $wait))))
                   (call $proc_exit (i32.atomic.load (i32.const 64)))"#,
            ),
        ),
        // As many threads as there can be; says how many.
        (
            "many-threads.wasm",
            threads(
                r#"(drop (memory.atomic.wait32 (i32.const 64) (i32.const 0) (i64.const -1)))"#,
                r#"(local $n i32)
                   (loop $more
                     (if (i32.ge_s (call $spawn (i32.const 0)) (i32.const 0)) (then
                       (local.set $n (i32.add (local.get $n) (i32.const 1)))
                       (br_if $more (i32.lt_u (local.get $n) (i32.const 200))))))
                   (call $proc_exit (local.get $n))"#,
            ),
        ),
        (
            "thread-trap.wasm",
            threads(
                "unreachable",
                r#"(drop (call $spawn (i32.const 0))) (loop $forever (br $forever))"#,
            ),
        ),
        ("hello.wasm", module(hello)),
        ("args.wasm", module(&strings("args_sizes", "args"))),
        ("env.wasm", module(&strings("environ_sizes", "environ"))),
        ("exit7.wasm", module(r#"(func (export "_start") (call $proc_exit (i32.const 7)))"#)),
        ("exit263.wasm", module(r#"(func (export "_start") (call $proc_exit (i32.const 263)))"#)),
        ("trap.wasm", module(r#"(func (export "_start") unreachable)"#)),
        (
            "divide.wasm",
            module(r#"(func (export "_start") (drop (i32.div_u (i32.const 1) (i32.const 0))))"#),
        ),
        (
            "outside.wasm",
            module(r#"(func (export "_start") (drop (i32.load (i32.const 0x7fffffff))))"#),
        ),
        ("spin.wasm", module(r#"(func (export "_start") (loop $l (br $l)))"#)),
        // With something to do after each call, so that it cannot become a loop.
        (
            "deep.wasm",
            module(
                r#"(func $f (export "_start") (call $f)
                  (i32.store (i32.const 512) (i32.add (i32.load (i32.const 512)) (i32.const 1))))"#,
            ),
        ),
        ("recurse.wasm", module(r#"(func $f (export "_start") (call $f))"#)),
        (
            "start.wasm",
            module(r#"(func $f (loop $l (br $l))) (start $f) (func (export "_start"))"#),
        ),
        ("sleep.wasm", module(sleep)),
        (
            "cat.wasm",
            module(&format!(
                r#"{OPEN} (func (export "_start") (call $copy (i32.const 0) (i32.const 1)))"#
            )),
        ),
        ("grow.wasm", module(grow)),
        ("eat.wasm", module(eat)),
        ("again.wasm", module(again)),
        ("two.wasm", module(two)),
        ("random.wasm", module(rand)),
        ("many.wasm", module(many)),
        ("hostname.wasm", reads("etc/hostname")),
        ("shadow.wasm", reads("etc/secret")),
        ("proc.wasm", reads("proc/self/status")),
        ("escape.wasm", reads("../../../../etc/passwd")),
        ("volume.wasm", reads("data/file")),
        ("write.wasm", writes("data/new")),
        ("scratch.wasm", writes("scratch")),
        (
            "four.wasm",
            wat::parse_str(r#"(module (memory 65535) (func (export "_start")))"#).unwrap(),
        ),
        (
            "import.wasm",
            wat::parse_str(
                r#"(module (import "env" "no_such_thing" (func)) (func (export "_start")))"#,
            )
            .unwrap(),
        ),
        ("library.wasm", wat::parse_str(r#"(module (func (export "add")))"#).unwrap()),
        ("ok.wasm", command("i32.const 0")),
        ("fail.wasm", command("i32.const 1")),
        ("component-trap.wasm", command("unreachable")),
        ("print.wasm", wat::parse_str(include_str!("wasm/print.wat")).unwrap()),
        ("http.wasm", wat::parse_str(include_str!("wasm/http.wat")).unwrap()),
        ("files.wasm", components::files()),
        ("connects.wasm", sockets::connects()),
        ("datagrams.wasm", sockets::datagrams()),
        ("looks-up.wasm", sockets::looks_up()),
        ("clocks.wasm", components::clocks()),
        ("nn.wasm", infers(&onnx::twice())),
        ("nn-bad.wasm", infers(b"no model")),
        (
            "nn-wild.wasm",
            wat::parse_str(
                r#"(module
                  (import "wasi_ephemeral_nn" "load" (func $load (param i32 i32 i32 i32 i32) (result i32)))
                  (memory (export "memory") 1)
                  (func (export "_start")
                    (drop (call $load (i32.const -16) (i32.const 1) (i32.const 1) (i32.const 0) (i32.const 128)))))"#,
            )
            .unwrap(),
        ),
        ("print3.wasm", wat::parse_str(include_str!("wasm/print3.wat")).unwrap()),
        ("http3.wasm", wat::parse_str(include_str!("wasm/http3.wat")).unwrap()),
        (
            "world.wasm",
            wat::parse_str(
                r#"(component
            (core module $m (func (export "x"))) (core instance $i (instantiate $m))
            (func $x (canon lift (core func $i "x"))) (export "x" (func $x)))"#,
            )
            .unwrap(),
        ),
        ("garbage.wasm", b"this is no WebAssembly\n".to_vec()),
        ("header.wasm", b"\0asm\x01".to_vec()),
        ("version.wasm", b"\0asm\x07\0\0\0".to_vec()),
        ("empty.wasm", Vec::new()),
    ]);
    let mut cut = all["hello.wasm"].clone();
    cut.truncate(cut.len() / 2);
    all.insert("truncated.wasm", cut);
    all
}

/// Makes the image known to containerd; once.
pub fn import() {
    static ONCE: OnceLock<()> = OnceLock::new();
    ONCE.get_or_init(|| {
        let dir = crate::bed().join("run/wasm");
        let files = dir.join("files");
        std::fs::create_dir_all(&files).unwrap();
        for (name, bytes) in programs() {
            std::fs::write(files.join(name), bytes).unwrap();
        }
        // Where there is WasmEdge: native code that its own compiler has made.
        let compiler = crate::bed().join("bin/wasmedge");
        if compiler.exists() {
            for name in ["exit7", "sleep"] {
                let path = |kind: &str| files.join(name).with_extension(kind);
                let (from, to) = (path("wasm"), path("so"));
                run(&compiler, &["compile", from.to_str().unwrap(), to.to_str().unwrap()]);
            }
        }
        let tar = dir.join("image.tar");
        pack(IMAGE, &files, &tar);
        load(&tar, &[]);
    });
}

/// Makes an archive of an image whose entrypoint is `/hello.wasm`, with all files of a directory.
pub fn pack(name: &str, files: &Path, tar: &Path) {
    pack_as(name, files, tar, &[]);
}

/// The same with these variables: `OS` and `ARCH` for its platform, `INDEX` for an index.
pub fn pack_as(name: &str, files: &Path, tar: &Path, variables: &[(&str, &str)]) {
    let script = crate::top().join("tests/bed/wasmimage.py");
    let busybox = crate::bed().join("src/busybox");
    let args =
        [script.as_path(), Path::new(name), &busybox, files, tar].map(|arg| arg.to_str().unwrap());
    let out = Command::new("python3").args(args).envs(variables.iter().copied()).output().unwrap();
    assert!(out.status.success(), "{}", String::from_utf8_lossy(&out.stderr));
}

/// Has containerd import an archive.
pub fn load(tar: &Path, options: &[&str]) {
    let mut words = vec!["images", "import"];
    words.extend(options);
    words.push(tar.to_str().unwrap());
    let out = ctr(&words);
    assert!(out.status.success(), "{}", String::from_utf8_lossy(&out.stderr));
}

/// Runs `ctr` in Kubernetes' namespace.
pub fn ctr(words: &[&str]) -> std::process::Output {
    let socket = crate::bed().join("run/containerd.sock");
    let ctr = crate::bed().join("root/usr/bin/ctr");
    let mut all = vec![ctr.to_str().unwrap(), "-a", socket.to_str().unwrap(), "-n", "k8s.io"];
    all.extend(words);
    crate::inside(&all)
}

/// The program of this name as one that nobody has compiled yet: with a section that means nothing.
pub fn new_one(name: &str) -> Vec<u8> {
    let mut bytes = programs().remove(name).unwrap();
    let unique = crate::cri::unique().to_string();
    // A custom section (core specification, 5.5.3): its length, its name with a length, its content.
    bytes.extend([0, u8::try_from(unique.len()).unwrap() + 2, 1, b'n']);
    bytes.extend(unique.bytes());
    bytes
}

fn run(program: &Path, args: &[&str]) {
    let out = Command::new(program).args(args).output().unwrap();
    assert!(out.status.success(), "{program:?}: {}", String::from_utf8_lossy(&out.stderr));
}
