//! The durable state of a pod.

use serde::{Deserialize, Serialize};
use serde_json::Value;

/// What is durable of a pod, beyond what the Controller records of every sandbox.
#[derive(Debug, Clone, Default, Serialize, Deserialize, PartialEq, Eq)]
#[serde(default)]
pub struct PodState {
    /// Engine of its containers.
    pub engine: String,
    /// cgroup parent, when the pod's cgroup was made by us.
    pub own_cgroup: Option<String>,
    /// Whether Start has made the namespaces.
    pub started: bool,
    /// Pid and cookie of the init of a shared PID namespace.
    pub init: Option<(u32, u64)>,
    /// What the flavor wants to be durable; `Null` where it wants nothing.
    #[serde(skip_serializing_if = "Value::is_null")]
    pub own: Value,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_state_without_what_a_flavor_keeps_is_read_and_written_as_ever() {
        let text = r#"{"engine":"runc","own_cgroup":"/p","started":true,"init":[7,99]}"#;
        let state: PodState = serde_json::from_str(text).unwrap();
        assert_eq!((state.engine.as_str(), state.init), ("runc", Some((7, 99))));
        assert!(state.own.is_null());
        assert_eq!(serde_json::to_string(&state).unwrap(), text);
        let own = PodState { own: serde_json::json!({"pid": 1}), ..state };
        let text = serde_json::to_string(&own).unwrap();
        assert_eq!(serde_json::from_str::<PodState>(&text).unwrap(), own);
    }
}
