//! Components of WASI 0.2 that do one thing each: files, clocks and random numbers; sockets are beside.
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
pub(super) type Host = (&'static str, &'static str, &'static str);

const STDOUT: [Host; 2] = [
    ("get-stdout", r#"$stdout "get-stdout""#, "(result i32)"),
    (
        "write",
        r#"$streams "[method]output-stream.blocking-write-and-flush""#,
        "(param i32 i32 i32 i32)",
    ),
];

/// A command that imports this, calls these functions, and whose module is `main`.
pub(super) fn command(imports: &str, host: &[Host], main: &str) -> Vec<u8> {
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
