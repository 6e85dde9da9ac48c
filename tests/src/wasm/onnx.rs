//! A model for WASI-NN: ONNX's `ModelProto`, in the wire format of protocol buffers, by hand.

/// A field that is a number.
fn number(field: u8, value: u8) -> Vec<u8> {
    vec![field << 3, value]
}

/// A field that is bytes, text, or a message: at most 127 bytes of it.
fn bytes(field: u8, content: &[u8]) -> Vec<u8> {
    let length = u8::try_from(content.len()).ok().filter(|length| *length < 128).unwrap();
    [&[field << 3 | 2, length], content].concat()
}

/// `name: float[2]`, a `ValueInfoProto`.
fn value(name: &str) -> Vec<u8> {
    let shape = bytes(1, &number(1, 2));
    let tensor = [number(1, 1), bytes(2, &shape)].concat();
    [bytes(1, name.as_bytes()), bytes(2, &bytes(1, &tensor))].concat()
}

/// `y = x + x`, by the operator `Add` of version 13.
pub fn twice() -> Vec<u8> {
    let node = [bytes(1, b"x"), bytes(1, b"x"), bytes(2, b"y"), bytes(4, b"Add")].concat();
    let graph =
        [bytes(1, &node), bytes(2, b"twice"), bytes(11, &value("x")), bytes(12, &value("y"))];
    let operators = [bytes(1, b""), number(2, 13)].concat();
    [number(1, 8), bytes(8, &operators), bytes(7, &graph.concat())].concat()
}
