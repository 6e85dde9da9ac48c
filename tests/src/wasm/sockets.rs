//! Components of WASI 0.2 that use the pod's network: a connection, a datagram, a name.

use super::components::{Host, command};

/// What all of them import: the network, its addresses and its errors.
const NETWORK: &str = r#"
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
    (export "ip-socket-address" (type (eq $any)))
    (type $either (variant (case "ipv4" $ipv4-address) (case "ipv6" $ipv6-address)))
    (export "ip-address" (type (eq $either)))))
  (alias export $network "network" (type $network-type))
  (alias export $network "error-code" (type $error-code))
  (alias export $network "ip-address-family" (type $family))
  (alias export $network "ip-socket-address" (type $address))
  (alias export $network "ip-address" (type $ip))
  (import "wasi:sockets/instance-network@0.2.0" (instance $instance-network
    (alias outer 1 $network-type (type $outer-network))
    (export "network" (type $network (eq $outer-network)))
    (export "instance-network" (func (result (own $network))))))"#;

/// The network itself.
const INSTANCE: Host = ("network", r#"$instance-network "instance-network""#, "(result i32)");
/// Waits for what can be waited for.
const BLOCK: Host = ("block", r#"$poll "[method]pollable.block""#, "(param i32)");
/// Says the number of the error and answers 1, where there is one.
const BAD: &str = r#"
  (func $bad (param $case i32) (param $error i32) (result i32)
    (if (i32.eqz (i32.load8_u (local.get $case))) (then (return (i32.const 0))))
    (call $number (i64.load8_u (local.get $error)))
    (i32.const 1))"#;

/// Connects to port 9000 of its own network, sends a line, and says what it gets; or the number of the
/// error, and 100 or 101 where it cannot send or gets nothing.
pub fn connects() -> Vec<u8> {
    let imports = NETWORK.to_owned()
        + r#"
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
        INSTANCE,
        (
            "connect",
            r#"$tcp "[method]tcp-socket.start-connect""#,
            "(param i32 i32 i32 i32 i32 i32 i32 i32 i32 i32 i32 i32 i32 i32 i32)",
        ),
        ("finish", r#"$tcp "[method]tcp-socket.finish-connect""#, "(param i32 i32)"),
        ("subscribe", r#"$tcp "[method]tcp-socket.subscribe""#, "(param i32) (result i32)"),
        BLOCK,
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
    command(&imports, &host, main)
}

/// Sends a datagram to port 9001 of its own network, and says what it gets; or the number of the error.
pub fn datagrams() -> Vec<u8> {
    let imports = NETWORK.to_owned()
        + r#"
      (import "wasi:sockets/udp@0.2.0" (instance $udp
        (export "udp-socket" (type $udp-socket (sub resource)))
        (export "incoming-datagram-stream" (type $incoming (sub resource)))
        (export "outgoing-datagram-stream" (type $outgoing (sub resource)))
        (alias outer 1 $network-type (type $outer-network))
        (export "network" (type $network (eq $outer-network)))
        (alias outer 1 $error-code (type $outer-error-code))
        (export "error-code" (type $error-code (eq $outer-error-code)))
        (alias outer 1 $address (type $outer-address))
        (export "ip-socket-address" (type $ip-socket-address (eq $outer-address)))
        (alias outer 1 $pollable (type $outer-pollable))
        (export "pollable" (type $pollable (eq $outer-pollable)))
        (type $in (record (field "data" (list u8)) (field "remote-address" $ip-socket-address)))
        (export "incoming-datagram" (type $incoming-datagram (eq $in)))
        (type $out (record (field "data" (list u8))
          (field "remote-address" (option $ip-socket-address))))
        (export "outgoing-datagram" (type $outgoing-datagram (eq $out)))
        (export "[method]udp-socket.start-bind" (func (param "self" (borrow $udp-socket))
          (param "network" (borrow $network)) (param "local-address" $ip-socket-address)
          (result (result (error $error-code)))))
        (export "[method]udp-socket.finish-bind" (func (param "self" (borrow $udp-socket))
          (result (result (error $error-code)))))
        (export "[method]udp-socket.stream" (func (param "self" (borrow $udp-socket))
          (param "remote-address" (option $ip-socket-address))
          (result (result (tuple (own $incoming) (own $outgoing)) (error $error-code)))))
        (export "[method]incoming-datagram-stream.receive" (func (param "self" (borrow $incoming))
          (param "max-results" u64)
          (result (result (list $incoming-datagram) (error $error-code)))))
        (export "[method]incoming-datagram-stream.subscribe" (func (param "self" (borrow $incoming))
          (result (own $pollable))))
        (export "[method]outgoing-datagram-stream.check-send" (func (param "self" (borrow $outgoing))
          (result (result u64 (error $error-code)))))
        (export "[method]outgoing-datagram-stream.send" (func (param "self" (borrow $outgoing))
          (param "datagrams" (list $outgoing-datagram))
          (result (result u64 (error $error-code)))))))
      (alias export $udp "udp-socket" (type $udp-socket))
      (import "wasi:sockets/udp-create-socket@0.2.0" (instance $create
        (alias outer 1 $error-code (type $outer-error-code))
        (export "error-code" (type $error-code (eq $outer-error-code)))
        (alias outer 1 $family (type $outer-family))
        (export "ip-address-family" (type $ip-address-family (eq $outer-family)))
        (alias outer 1 $udp-socket (type $outer-socket))
        (export "udp-socket" (type $udp-socket (eq $outer-socket)))
        (export "create-udp-socket" (func (param "address-family" $ip-address-family)
          (result (result (own $udp-socket) (error $error-code)))))))"#;
    // An address is twelve numbers.
    let addressed = "(param i32 i32 i32 i32 i32 i32 i32 i32 i32 i32 i32 i32 i32 i32 i32)";
    let incoming = r#"$udp "[method]incoming-datagram-stream.receive""#;
    let host = [
        INSTANCE,
        BLOCK,
        ("create", r#"$create "create-udp-socket""#, "(param i32 i32)"),
        ("bind", r#"$udp "[method]udp-socket.start-bind""#, addressed),
        ("bound", r#"$udp "[method]udp-socket.finish-bind""#, "(param i32 i32)"),
        ("stream", r#"$udp "[method]udp-socket.stream""#, addressed),
        ("check", r#"$udp "[method]outgoing-datagram-stream.check-send""#, "(param i32 i32)"),
        ("send", r#"$udp "[method]outgoing-datagram-stream.send""#, "(param i32 i32 i32 i32)"),
        ("receive", incoming, "(param i32 i64 i32)"),
        (
            "subscribe",
            r#"$udp "[method]incoming-datagram-stream.subscribe""#,
            "(param i32) (result i32)",
        ),
    ];
    let main = r#"
      (data (i32.const 2000) "hello in a datagram\n")
      (func (export "run") (result i32)
        (local $socket i32) (local $in i32) (local $out i32)
        (call $create (i32.const 0) (i32.const 16))
        (if (call $bad (i32.const 16) (i32.const 20)) (then (return (i32.const 1))))
        (local.set $socket (i32.load (i32.const 20)))
        (call $bind (local.get $socket) (call $network) (i32.const 0) (i32.const 0)
          (i32.const 127) (i32.const 0) (i32.const 0) (i32.const 1)
          (i32.const 0) (i32.const 0) (i32.const 0) (i32.const 0) (i32.const 0) (i32.const 0)
          (i32.const 32))
        (if (call $bad (i32.const 32) (i32.const 33)) (then (return (i32.const 1))))
        (call $bound (local.get $socket) (i32.const 48))
        (if (call $bad (i32.const 48) (i32.const 49)) (then (return (i32.const 1))))
        (call $stream (local.get $socket) (i32.const 1) (i32.const 0) (i32.const 9001)
          (i32.const 127) (i32.const 0) (i32.const 0) (i32.const 1)
          (i32.const 0) (i32.const 0) (i32.const 0) (i32.const 0) (i32.const 0) (i32.const 0)
          (i32.const 64))
        (if (call $bad (i32.const 64) (i32.const 68)) (then (return (i32.const 1))))
        (local.set $in (i32.load (i32.const 68)))
        (local.set $out (i32.load (i32.const 72)))
        (call $check (local.get $out) (i32.const 80))
        (if (call $bad (i32.const 80) (i32.const 88)) (then (return (i32.const 1))))
        ;; One datagram: where it is, how long, and to nobody else than the stream's.
        (i32.store (i32.const 1200) (i32.const 2000))
        (i32.store (i32.const 1204) (i32.const 20))
        (call $send (local.get $out) (i32.const 1200) (i32.const 1) (i32.const 96))
        (if (call $bad (i32.const 96) (i32.const 104)) (then (return (i32.const 1))))
        (loop $more
          (call $block (call $subscribe (local.get $in)))
          (call $receive (local.get $in) (i64.const 1) (i32.const 112))
          (if (call $bad (i32.const 112) (i32.const 116)) (then (return (i32.const 1))))
          (br_if $more (i32.eqz (i32.load (i32.const 120)))))
        (call $say (i32.load (i32.load (i32.const 116)))
          (i32.load offset=4 (i32.load (i32.const 116))))
        (i32.const 0))"#;
    command(&imports, &host, &format!("{BAD} {main}"))
}

/// Looks up the name `app.example`; says the numbers of the addresses that it has, 6 for one of IPv6, or the
/// number of the error.
pub fn looks_up() -> Vec<u8> {
    let imports = NETWORK.to_owned()
        + r#"
      (import "wasi:sockets/ip-name-lookup@0.2.0" (instance $lookup
        (export "resolve-address-stream" (type $stream (sub resource)))
        (alias outer 1 $network-type (type $outer-network))
        (export "network" (type $network (eq $outer-network)))
        (alias outer 1 $error-code (type $outer-error-code))
        (export "error-code" (type $error-code (eq $outer-error-code)))
        (alias outer 1 $ip (type $outer-ip))
        (export "ip-address" (type $ip-address (eq $outer-ip)))
        (alias outer 1 $pollable (type $outer-pollable))
        (export "pollable" (type $pollable (eq $outer-pollable)))
        (export "resolve-addresses" (func (param "network" (borrow $network)) (param "name" string)
          (result (result (own $stream) (error $error-code)))))
        (export "[method]resolve-address-stream.resolve-next-address" (func
          (param "self" (borrow $stream)) (result (result (option $ip-address) (error $error-code)))))
        (export "[method]resolve-address-stream.subscribe" (func (param "self" (borrow $stream))
          (result (own $pollable))))))"#;
    let host = [
        INSTANCE,
        BLOCK,
        ("resolve", r#"$lookup "resolve-addresses""#, "(param i32 i32 i32 i32)"),
        (
            "next",
            r#"$lookup "[method]resolve-address-stream.resolve-next-address""#,
            "(param i32 i32)",
        ),
        (
            "subscribe",
            r#"$lookup "[method]resolve-address-stream.subscribe""#,
            "(param i32) (result i32)",
        ),
    ];
    // Error 8 is that it would block.
    let main = r#"
      (data (i32.const 2000) "app.example")
      (func (export "run") (result i32)
        (local $stream i32)
        (call $resolve (call $network) (i32.const 2000) (i32.const 11) (i32.const 16))
        (if (call $bad (i32.const 16) (i32.const 20)) (then (return (i32.const 1))))
        (local.set $stream (i32.load (i32.const 20)))
        (loop $more
          (call $next (local.get $stream) (i32.const 32))
          (if (i32.load8_u (i32.const 32)) (then
            (if (i32.eq (i32.load8_u (i32.const 34)) (i32.const 8)) (then
              (call $block (call $subscribe (local.get $stream)))
              (br $more)))
            (call $number (i64.load8_u (i32.const 34)))
            (return (i32.const 1))))
          (if (i32.load8_u (i32.const 34)) (then
            (if (i32.load8_u (i32.const 36)) (then (call $number (i64.const 6))) (else
              (call $number (i64.load8_u (i32.const 38)))
              (call $number (i64.load8_u (i32.const 39)))
              (call $number (i64.load8_u (i32.const 40)))
              (call $number (i64.load8_u (i32.const 41)))))
            (br $more))))
        (i32.const 0))"#;
    command(&imports, &host, &format!("{BAD} {main}"))
}
