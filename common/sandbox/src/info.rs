//! `info["info"]` of a verbose Status: CRI's SandboxInfo as containerd's own controller prints
//! it. containerd 2.3 and later parse it, so the pod's configuration is spelled as Go's
//! `encoding/json` spells the CRI structs: field names as in the `.proto`, enums as numbers,
//! what is empty left out.

use protobuf::MessageDyn;
use protobuf::reflect::{ReflectFieldRef, ReflectValueRef};
use serde_json::{Map, Value, json};

use crate::store::{Phase, Record};
use crate::wire::rfc3339;

/// Type of an OCI spec in an Any, see containerd's `pkg/protobuf` and typeurl registrations.
pub(crate) const SPEC_TYPE: &str = "types.containerd.io/opencontainers/runtime-spec/1/Spec";

/// CRI's own record of the sandbox, where containerd sends one (engine-contract §1.3).
fn metadata(r: &Record) -> Option<Value> {
    let (_, value) = r.spec.extensions.get("metadata")?;
    let mut envelope: Value = serde_json::from_slice(value).ok()?;
    envelope.get_mut("Metadata").map(Value::take)
}

/// The JSON text.
pub(crate) fn sandbox_info(r: &Record) -> String {
    let metadata = metadata(r).unwrap_or(Value::Null);
    let status = match r.phase {
        Phase::Ready | Phase::Stopping => "running",
        Phase::Creating | Phase::Created | Phase::Starting => "created",
        Phase::Stopped | Phase::Removing => "stopped",
    };
    let netns = &r.spec.netns_path;
    let spec = r.started.spec.as_ref().and_then(|s| serde_json::from_slice::<Value>(s).ok());
    let mut info = json!({
        "pid": r.started.pid,
        "processStatus": status,
        "netNamespaceClosed": !netns.is_empty() && !std::path::Path::new(netns).exists(),
        "image": "",
        "snapshotKey": "",
        "snapshotter": "",
        "runtimeHandler": metadata.get("RuntimeHandler").and_then(Value::as_str).unwrap_or(""),
        "runtimeType": r.spec.runtime,
        "runtimeOptions": null,
        "config": go_json(&r.spec.config),
        "runtimeSpec": spec,
        "cniResult": metadata.get("CNIResult").cloned().unwrap_or(Value::Null),
        "createdAt": rfc3339(r.created_at),
    });
    if let (Some(map), false) = (info.as_object_mut(), metadata.is_null()) {
        map.insert("sandboxMetadata".into(), metadata);
    }
    info.to_string()
}

/// A message as Go's `encoding/json` prints its generated struct.
pub(crate) fn go_json(message: &dyn MessageDyn) -> Value {
    let mut map = Map::new();
    for field in message.descriptor_dyn().fields() {
        let value = match field.get_reflect(message) {
            ReflectFieldRef::Optional(value) => value.value().and_then(|v| go_value(&v)),
            ReflectFieldRef::Repeated(list) if !list.is_empty() => {
                Some(list.into_iter().map(|v| go_value(&v).unwrap_or_else(|| zero(&v))).collect())
            }
            ReflectFieldRef::Map(entries) if !entries.is_empty() => Some(
                entries
                    .into_iter()
                    .map(|(k, v)| (k.to_string(), go_value(&v).unwrap_or_else(|| zero(&v))))
                    .collect::<Map<_, _>>()
                    .into(),
            ),
            _ => None,
        };
        if let Some(value) = value {
            map.insert(field.name().to_owned(), value);
        }
    }
    map.into()
}

/// A value, or nothing when it is what `omitempty` leaves out.
fn go_value(value: &ReflectValueRef<'_>) -> Option<Value> {
    let value = match value {
        ReflectValueRef::Message(m) => return Some(go_json(&**m)),
        ReflectValueRef::Enum(_, n) => json!(n),
        ReflectValueRef::U32(n) => json!(n),
        ReflectValueRef::U64(n) => json!(n),
        ReflectValueRef::I32(n) => json!(n),
        ReflectValueRef::I64(n) => json!(n),
        ReflectValueRef::F32(n) => json!(n),
        ReflectValueRef::F64(n) => json!(n),
        ReflectValueRef::Bool(b) => return b.then_some(Value::Bool(true)),
        ReflectValueRef::String(s) => return (!s.is_empty()).then(|| json!(s)),
        ReflectValueRef::Bytes(_) => return None,
    };
    (value.as_f64() != Some(0.0)).then_some(value)
}

/// The zero value inside of a list or map, where nothing is left out.
fn zero(value: &ReflectValueRef<'_>) -> Value {
    match value {
        ReflectValueRef::String(_) | ReflectValueRef::Bytes(_) => json!(""),
        ReflectValueRef::Bool(_) => json!(false),
        _ => json!(0),
    }
}
