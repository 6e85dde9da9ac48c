//! Components of WASI 0.2 that do one thing each: files, a connection, clocks and random numbers.
//!
//! What they import is written as the component model has it: an interface is an instance with the
//! types that its functions name. Canonical ABI: what does not fit into one value is written to where the
//! last parameter says, a result's case first.

/// What all of them have: streams, what can be waited for, and standard output.
const COMMON: &str = r#"
  (import "wasi:io/error@0.2.0" (instance $error (export "error" (type (sub resource)))))
  (alias export $error "error" (type $error-type))
  (import "wasi:io/poll@0.2.0" (instance $poll
    (export "pollable" (type $pollable (sub resource)))
    (export "[method]pollable.block" (func (param "self" (borrow $pollable))))))
  (alias export $poll "pollable" (type $pollable))
  (import "wasi:io/streams@0.2.0" (instance $streams
    (export "output-stream" (type $output-stream (sub resource)))
    (export "input-stream" (type $input-stream (sub resource)))
    (alias outer 1 $error-type (type $outer-error))
    (export "error" (type $error (eq $outer-error)))
    (type $error-variant (variant (case "last-operation-failed" (own $error)) (case "closed")))
    (export "stream-error" (type $stream-error (eq $error-variant)))
    (export "[method]input-stream.blocking-read" (func
      (param "self" (borrow $input-stream)) (param "len" u64)
      (result (result (list u8) (error $stream-error)))))
    (export "[method]output-stream.blocking-write-and-flush" (func
      (param "self" (borrow $output-stream)) (param "contents" (list u8))
      (result (result (error $stream-error)))))))
  (alias export $streams "input-stream" (type $input))
  (alias export $streams "output-stream" (type $output))
  (import "wasi:cli/stdout@0.2.0" (instance $stdout
    (alias outer 1 $output (type $outer-stream))
    (export "output-stream" (type $output-stream (eq $outer-stream)))
    (export "get-stdout" (func (result (own $output-stream))))))
  (core module $memory-module
    (memory (export "memory") 1)
    (global $top (mut i32) (i32.const 16384))
    (func (export "realloc") (param i32 i32 i32) (param $size i32) (result i32)
      (local $at i32)
      (local.set $at (global.get $top))
      ;; Everything aligned by eight, and nothing given back.
      (global.set $top (i32.and (i32.const -8)
        (i32.add (i32.add (local.get $at) (local.get $size)) (i32.const 7))))
      (local.get $at)))
  (core instance $memory (instantiate $memory-module))
"#;

/// How they say something: `$say` writes a piece of memory, `$number` a number with a line's end.
const MAIN: &str = r#"
  (global $out (mut i32) (i32.const -1))
  (func $say (param $at i32) (param $len i32)
    (if (i32.eq (global.get $out) (i32.const -1)) (then (global.set $out (call $get-stdout))))
    (call $write (global.get $out) (local.get $at) (local.get $len) (i32.const 0)))
  (func $number (param $n i64)
    (local $at i32)
    (local.set $at (i32.const 1023))
    (i32.store8 (local.get $at) (i32.const 10))
    (loop $digit
      (local.set $at (i32.sub (local.get $at) (i32.const 1)))
      (i32.store8 (local.get $at)
        (i32.add (i32.const 48) (i32.wrap_i64 (i64.rem_u (local.get $n) (i64.const 10)))))
      (local.set $n (i64.div_u (local.get $n) (i64.const 10)))
      (br_if $digit (i64.ne (local.get $n) (i64.const 0))))
    (call $say (local.get $at) (i32.sub (i32.const 1024) (local.get $at))))
"#;

/// A function of the host's: what the module calls it, where it is, its type in the module.
type Host = (&'static str, &'static str, &'static str);

const STDOUT: [Host; 2] = [
    ("get-stdout", r#"$stdout "get-stdout""#, "(result i32)"),
    (
        "write",
        r#"$streams "[method]output-stream.blocking-write-and-flush""#,
        "(param i32 i32 i32 i32)",
    ),
];

/// A command that imports this, calls these functions, and whose module is `main`.
fn command(imports: &str, host: &[Host], main: &str) -> Vec<u8> {
    let (mut lowered, mut taken, mut given) = (String::new(), String::new(), String::new());
    for (name, function, kind) in STDOUT.iter().chain(host) {
        lowered += &format!(
            r#"(core func ${name} (canon lower (func {function}) (memory (core memory $memory "memory"))
              (realloc (core func $memory "realloc")) string-encoding=utf8))"#
        );
        taken += &format!(r#"(import "host" "{name}" (func ${name} {kind}))"#);
        given += &format!(r#"(export "{name}" (func ${name}))"#);
    }
    let text = format!(
        r#"(component {COMMON} {imports} {lowered}
          (core module $main (import "host" "memory" (memory 1)) {taken} {MAIN} {main})
          (core instance $i (instantiate $main (with "host" (instance
            (export "memory" (memory $memory "memory")) {given}))))
          (func $run (result (result)) (canon lift (core func $i "run")))
          (instance $exports (export "run" (func $run)))
          (export "wasi:cli/run@0.2.0" (instance $exports)))"#
    );
    wat::parse_str(text).unwrap()
}

/// Says where its first directory is, what is in `data/file`, the number of the error when it looks above its
/// root, and the number when it may not write `data/new`, else `written`.
pub fn files() -> Vec<u8> {
    let imports = r#"
      (import "wasi:filesystem/types@0.2.0" (instance $types
        (export "descriptor" (type $descriptor (sub resource)))
        (type $codes (enum "access" "would-block" "already" "bad-descriptor" "busy" "deadlock" "quota"
          "exist" "file-too-large" "illegal-byte-sequence" "in-progress" "interrupted" "invalid" "io"
          "is-directory" "loop" "too-many-links" "message-size" "name-too-long" "no-device" "no-entry"
          "no-lock" "insufficient-memory" "insufficient-space" "not-directory" "not-empty"
          "not-recoverable" "unsupported" "no-tty" "no-such-device" "overflow" "not-permitted" "pipe"
          "read-only" "invalid-seek" "text-file-busy" "cross-device"))
        (export "error-code" (type $error-code (eq $codes)))
        (type $d-flags (flags "read" "write" "file-integrity-sync" "data-integrity-sync"
          "requested-write-sync" "mutate-directory"))
        (export "descriptor-flags" (type $descriptor-flags (eq $d-flags)))
        (type $p-flags (flags "symlink-follow"))
        (export "path-flags" (type $path-flags (eq $p-flags)))
        (type $o-flags (flags "create" "directory" "exclusive" "truncate"))
        (export "open-flags" (type $open-flags (eq $o-flags)))
        (export "[method]descriptor.open-at" (func (param "self" (borrow $descriptor))
          (param "path-flags" $path-flags) (param "path" string) (param "open-flags" $open-flags)
          (param "flags" $descriptor-flags) (result (result (own $descriptor) (error $error-code)))))
        (export "[method]descriptor.read" (func (param "self" (borrow $descriptor))
          (param "length" u64) (param "offset" u64)
          (result (result (tuple (list u8) bool) (error $error-code)))))
        (export "[method]descriptor.write" (func (param "self" (borrow $descriptor))
          (param "buffer" (list u8)) (param "offset" u64) (result (result u64 (error $error-code)))))))
      (alias export $types "descriptor" (type $descriptor))
      (import "wasi:filesystem/preopens@0.2.0" (instance $preopens
        (alias outer 1 $descriptor (type $outer-descriptor))
        (export "descriptor" (type $descriptor (eq $outer-descriptor)))
        (export "get-directories" (func (result (list (tuple (own $descriptor) string)))))))"#;
    let host = [
        ("directories", r#"$preopens "get-directories""#, "(param i32)"),
        ("open", r#"$types "[method]descriptor.open-at""#, "(param i32 i32 i32 i32 i32 i32 i32)"),
        ("read", r#"$types "[method]descriptor.read""#, "(param i32 i64 i64 i32)"),
        ("store", r#"$types "[method]descriptor.write""#, "(param i32 i32 i32 i64 i32)"),
    ];
    let main = r#"
      (data (i32.const 2000) "\n") (data (i32.const 2010) "data/file")
      (data (i32.const 2030) "../etc/secret") (data (i32.const 2050) "data/new")
      (data (i32.const 2070) "written\n")
      (func (export "run") (result i32)
        (local $dir i32)
        (call $directories (i32.const 16))
        (local.set $dir (i32.load (i32.load (i32.const 16))))
        (call $say (i32.load offset=4 (i32.load (i32.const 16)))
          (i32.load offset=8 (i32.load (i32.const 16))))
        (call $say (i32.const 2000) (i32.const 1))
        (call $open (local.get $dir) (i32.const 1) (i32.const 2010) (i32.const 9)
          (i32.const 0) (i32.const 1) (i32.const 32))
        (if (i32.load8_u (i32.const 32)) (then (return (i32.const 1))))
        (call $read (i32.load (i32.const 36)) (i64.const 64) (i64.const 0) (i32.const 64))
        (if (i32.load8_u (i32.const 64)) (then (return (i32.const 1))))
        (call $say (i32.load (i32.const 68)) (i32.load (i32.const 72)))
        (call $say (i32.const 2000) (i32.const 1))
        (call $open (local.get $dir) (i32.const 1) (i32.const 2030) (i32.const 13)
          (i32.const 0) (i32.const 1) (i32.const 32))
        (if (i32.eqz (i32.load8_u (i32.const 32))) (then (return (i32.const 1))))
        (call $number (i64.load8_u (i32.const 36)))
        ;; Created, to be written.
        (call $open (local.get $dir) (i32.const 1) (i32.const 2050) (i32.const 8)
          (i32.const 1) (i32.const 2) (i32.const 32))
        (if (i32.load8_u (i32.const 32)) (then
          (call $number (i64.load8_u (i32.const 36)))
          (return (i32.const 0))))
        (call $store (i32.load (i32.const 36)) (i32.const 2070) (i32.const 7) (i64.const 0)
          (i32.const 96))
        (if (i32.load8_u (i32.const 96)) (then (return (i32.const 1))))
        (call $say (i32.const 2070) (i32.const 8))
        (i32.const 0))"#;
    command(imports, &host, main)
}

/// Connects to port 9000 of its own network, sends a line, and says what it gets; or the number of the
/// error, and 100 or 101 where it cannot send or gets nothing.
pub fn connects() -> Vec<u8> {
    let imports = r#"
      (import "wasi:sockets/network@0.2.0" (instance $network
        (export "network" (type $network (sub resource)))
        (type $codes (enum "unknown" "access-denied" "not-supported" "invalid-argument" "out-of-memory"
          "timeout" "concurrency-conflict" "not-in-progress" "would-block" "invalid-state"
          "new-socket-limit" "address-not-bindable" "address-in-use" "remote-unreachable"
          "connection-refused" "connection-reset" "connection-aborted" "datagram-too-large"
          "name-unresolvable" "temporary-resolver-failure" "permanent-resolver-failure"))
        (export "error-code" (type $error-code (eq $codes)))
        (type $families (enum "ipv4" "ipv6"))
        (export "ip-address-family" (type $ip-address-family (eq $families)))
        (type $four (tuple u8 u8 u8 u8))
        (export "ipv4-address" (type $ipv4-address (eq $four)))
        (type $eight (tuple u16 u16 u16 u16 u16 u16 u16 u16))
        (export "ipv6-address" (type $ipv6-address (eq $eight)))
        (type $v4 (record (field "port" u16) (field "address" $ipv4-address)))
        (export "ipv4-socket-address" (type $ipv4-socket-address (eq $v4)))
        (type $v6 (record (field "port" u16) (field "flow-info" u32) (field "address" $ipv6-address)
          (field "scope-id" u32)))
        (export "ipv6-socket-address" (type $ipv6-socket-address (eq $v6)))
        (type $any (variant (case "ipv4" $ipv4-socket-address) (case "ipv6" $ipv6-socket-address)))
        (export "ip-socket-address" (type (eq $any)))))
      (alias export $network "network" (type $network-type))
      (alias export $network "error-code" (type $error-code))
      (alias export $network "ip-address-family" (type $family))
      (alias export $network "ip-socket-address" (type $address))
      (import "wasi:sockets/instance-network@0.2.0" (instance $instance-network
        (alias outer 1 $network-type (type $outer-network))
        (export "network" (type $network (eq $outer-network)))
        (export "instance-network" (func (result (own $network))))))
      (import "wasi:sockets/tcp@0.2.0" (instance $tcp
        (export "tcp-socket" (type $tcp-socket (sub resource)))
        (alias outer 1 $network-type (type $outer-network))
        (export "network" (type $network (eq $outer-network)))
        (alias outer 1 $error-code (type $outer-error-code))
        (export "error-code" (type $error-code (eq $outer-error-code)))
        (alias outer 1 $address (type $outer-address))
        (export "ip-socket-address" (type $ip-socket-address (eq $outer-address)))
        (alias outer 1 $pollable (type $outer-pollable))
        (export "pollable" (type $pollable (eq $outer-pollable)))
        (alias outer 1 $input (type $outer-input))
        (export "input-stream" (type $input-stream (eq $outer-input)))
        (alias outer 1 $output (type $outer-output))
        (export "output-stream" (type $output-stream (eq $outer-output)))
        (export "[method]tcp-socket.start-connect" (func (param "self" (borrow $tcp-socket))
          (param "network" (borrow $network)) (param "remote-address" $ip-socket-address)
          (result (result (error $error-code)))))
        (export "[method]tcp-socket.finish-connect" (func (param "self" (borrow $tcp-socket))
          (result (result (tuple (own $input-stream) (own $output-stream)) (error $error-code)))))
        (export "[method]tcp-socket.subscribe" (func (param "self" (borrow $tcp-socket))
          (result (own $pollable))))))
      (alias export $tcp "tcp-socket" (type $tcp-socket))
      (import "wasi:sockets/tcp-create-socket@0.2.0" (instance $create
        (alias outer 1 $error-code (type $outer-error-code))
        (export "error-code" (type $error-code (eq $outer-error-code)))
        (alias outer 1 $family (type $outer-family))
        (export "ip-address-family" (type $ip-address-family (eq $outer-family)))
        (alias outer 1 $tcp-socket (type $outer-socket))
        (export "tcp-socket" (type $tcp-socket (eq $outer-socket)))
        (export "create-tcp-socket" (func (param "address-family" $ip-address-family)
          (result (result (own $tcp-socket) (error $error-code)))))))"#;
    let host = [
        ("create", r#"$create "create-tcp-socket""#, "(param i32 i32)"),
        ("network", r#"$instance-network "instance-network""#, "(result i32)"),
        (
            "connect",
            r#"$tcp "[method]tcp-socket.start-connect""#,
            "(param i32 i32 i32 i32 i32 i32 i32 i32 i32 i32 i32 i32 i32 i32 i32)",
        ),
        ("finish", r#"$tcp "[method]tcp-socket.finish-connect""#, "(param i32 i32)"),
        ("subscribe", r#"$tcp "[method]tcp-socket.subscribe""#, "(param i32) (result i32)"),
        ("block", r#"$poll "[method]pollable.block""#, "(param i32)"),
        ("read", r#"$streams "[method]input-stream.blocking-read""#, "(param i32 i64 i32)"),
    ];
    // Error 8 is that it would block.
    let main = r#"
      (data (i32.const 2000) "hello over a socket\n")
      (func (export "run") (result i32)
        (local $socket i32)
        (call $create (i32.const 0) (i32.const 16))
        (if (i32.load8_u (i32.const 16)) (then
          (call $number (i64.load8_u (i32.const 20)))
          (return (i32.const 1))))
        (local.set $socket (i32.load (i32.const 20)))
        (call $connect (local.get $socket) (call $network) (i32.const 0) (i32.const 9000)
          (i32.const 127) (i32.const 0) (i32.const 0) (i32.const 1)
          (i32.const 0) (i32.const 0) (i32.const 0) (i32.const 0) (i32.const 0) (i32.const 0)
          (i32.const 32))
        (if (i32.load8_u (i32.const 32)) (then
          (call $number (i64.load8_u (i32.const 33)))
          (return (i32.const 1))))
        (loop $more
          (call $block (call $subscribe (local.get $socket)))
          (call $finish (local.get $socket) (i32.const 48))
          (br_if $more (i32.and (i32.load8_u (i32.const 48))
            (i32.eq (i32.load8_u (i32.const 52)) (i32.const 8)))))
        (if (i32.load8_u (i32.const 48)) (then
          (call $number (i64.load8_u (i32.const 52)))
          (return (i32.const 1))))
        (call $write (i32.load (i32.const 56)) (i32.const 2000) (i32.const 20) (i32.const 64))
        (if (i32.load8_u (i32.const 64)) (then
          (call $number (i64.const 100))
          (return (i32.const 1))))
        (call $read (i32.load (i32.const 52)) (i64.const 64) (i32.const 80))
        (if (i32.load8_u (i32.const 80)) (then
          (call $number (i64.const 101))
          (return (i32.const 1))))
        (call $say (i32.load (i32.const 84)) (i32.load (i32.const 88)))
        (i32.const 0))"#;
    command(imports, &host, main)
}

/// Waits for 200 ms; says for how many nanoseconds it has, how many seconds it is since 1970, and two
/// random numbers.
pub fn clocks() -> Vec<u8> {
    let imports = r#"
      (import "wasi:clocks/monotonic-clock@0.2.0" (instance $monotonic
        (alias outer 1 $pollable (type $outer-pollable))
        (export "pollable" (type $pollable (eq $outer-pollable)))
        (export "now" (func (result u64)))
        (export "subscribe-duration" (func (param "when" u64) (result (own $pollable))))))
      (import "wasi:clocks/wall-clock@0.2.0" (instance $wall
        (type $time (record (field "seconds" u64) (field "nanoseconds" u32)))
        (export "datetime" (type $datetime (eq $time)))
        (export "now" (func (result $datetime)))))
      (import "wasi:random/random@0.2.0" (instance $random
        (export "get-random-bytes" (func (param "len" u64) (result (list u8))))
        (export "get-random-u64" (func (result u64)))))"#;
    let host = [
        ("now", r#"$monotonic "now""#, "(result i64)"),
        ("after", r#"$monotonic "subscribe-duration""#, "(param i64) (result i32)"),
        ("block", r#"$poll "[method]pollable.block""#, "(param i32)"),
        ("wall", r#"$wall "now""#, "(param i32)"),
        ("random", r#"$random "get-random-u64""#, "(result i64)"),
        ("bytes", r#"$random "get-random-bytes""#, "(param i64 i32)"),
    ];
    let main = r#"
      (func (export "run") (result i32)
        (local $begun i64)
        (local.set $begun (call $now))
        (call $block (call $after (i64.const 200000000)))
        (call $number (i64.sub (call $now) (local.get $begun)))
        (call $wall (i32.const 16))
        (call $number (i64.load (i32.const 16)))
        (call $number (call $random))
        (call $bytes (i64.const 8) (i32.const 32))
        (if (i32.ne (i32.load (i32.const 36)) (i32.const 8)) (then (return (i32.const 1))))
        (call $number (i64.load (i32.load (i32.const 32))))
        (i32.const 0))"#;
    command(imports, &host, main)
}
