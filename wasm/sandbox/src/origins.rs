//! What kind of an image each container of a pod came from, for a verbose Status.
//!
//! A runtime is told the image's name (by CRI, in an annotation of the spec) and no more: containerd is
//! asked for the rest when somebody wants to know, and its answer is kept. It is what the name leads to then.

use std::collections::{BTreeMap, HashMap};
use std::sync::{Arc, Mutex, PoisonError};

use serde_json::{Map, Value, json};
use tokio::time::Instant;
use wasm_image::origin::{self, Origin};

use crate::config::ContainerdConfig;
use crate::containerd::Store;

/// Annotation with the image's name: containerd's own, or the one that the pod's author has written.
pub const NAME: &str = "io.kubernetes.cri.image-name";
/// Longest name that is looked up.
const MAX_NAME: usize = 1024;
/// containerd's namespace of what CRI runs.
const NAMESPACE: &str = "k8s.io";

/// What is known of one pod, by container.
#[derive(Debug, Default)]
pub struct Origins(Mutex<HashMap<String, Value>>);

impl Origins {
    /// Adds `image` to what is `shown` of the containers whose images have the `names` that are given, as far as
    /// containerd answers in time. What has gone is forgotten.
    pub async fn add(
        &self,
        containerd: &ContainerdConfig,
        namespace: &str,
        names: &BTreeMap<String, String>,
        shown: &mut Map<String, Value>,
    ) {
        let (mut known, missing) = self.known(names);
        if !missing.is_empty() && !containerd.address.as_os_str().is_empty() {
            let new = ask(containerd, namespace, missing).await;
            let mut kept = self.0.lock().unwrap_or_else(PoisonError::into_inner);
            kept.extend(new.iter().map(|(id, image)| (id.clone(), image.clone())));
            known.extend(new);
        }
        for (id, image) in known {
            if let Some(container) = shown.get_mut(&id).and_then(Value::as_object_mut) {
                container.insert("image".into(), image);
            }
        }
    }

    /// What is known of these containers, and what is not: ids by the image's name.
    fn known(
        &self,
        names: &BTreeMap<String, String>,
    ) -> (HashMap<String, Value>, BTreeMap<String, Vec<String>>) {
        let mut kept = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        // There are as many as Status shows, at most.
        kept.retain(|id, _| names.contains_key(id));
        let mut missing: BTreeMap<String, Vec<String>> = BTreeMap::new();
        for (id, name) in names.iter().filter(|(id, _)| !kept.contains_key(*id)) {
            missing.entry(name.clone()).or_default().push(id.clone());
        }
        (kept.clone(), missing)
    }
}

/// Asks containerd for images by name, each for the containers that have it.
async fn ask(
    containerd: &ContainerdConfig,
    namespace: &str,
    wanted: BTreeMap<String, Vec<String>>,
) -> HashMap<String, Value> {
    let mut found = HashMap::new();
    let until = Instant::now() + containerd.timeout;
    let namespace = if namespace.is_empty() { NAMESPACE } else { namespace };
    let connect = Store::connect(&containerd.address, namespace, Some(until));
    let store = match tokio::time::timeout_at(until, connect).await {
        Ok(Ok(store)) => Arc::new(store),
        Ok(Err(error)) => {
            tracing::debug!(error, "images are not told of: containerd cannot be asked");
            return found;
        }
        Err(_) => {
            tracing::debug!("images are not told of: containerd does not answer");
            return found;
        }
    };
    for (name, ids) in wanted {
        match one(&store, &name).await {
            Ok(Origin { kind, platform }) => {
                let image = json!({ "name": name, "kind": kind, "platform": platform });
                found.extend(ids.into_iter().map(|id| (id, image.clone())));
            }
            Err(error) => tracing::debug!(image = name, error, "its kind is not told"),
        }
    }
    found
}

async fn one(store: &Arc<Store>, name: &str) -> Result<Origin, String> {
    if name.len() > MAX_NAME {
        return Err("its name is too long".into());
    }
    let target = match store.image(name).await {
        Ok(target) => target,
        Err(error) => {
            let whole = whole(name);
            if whole == name {
                return Err(error);
            }
            store.image(&whole).await?
        }
    };
    let store = store.clone();
    // Documents are read as they come, by code that waits; it ends when the time is over.
    let work = tokio::task::spawn_blocking(move || origin::origin(&*store, target));
    work.await.map_err(|error| error.to_string())?
}

/// The name that an image has in containerd where its author has written a short one, such as `app` or `user/app`.
fn whole(name: &str) -> String {
    let registry = name.split_once('/').map(|(first, _)| first);
    let registry = registry.filter(|first| first.contains(['.', ':']) || *first == "localhost");
    let mut whole = match (registry, name.contains('/')) {
        (Some(_), _) => name.to_owned(),
        (None, true) => format!("docker.io/{name}"),
        (None, false) => format!("docker.io/library/{name}"),
    };
    let tag = |name: &str| {
        let last = name.rfind('/').unwrap_or(0);
        name.get(last..).and_then(|name| name.find(':')).map(|at| last + at)
    };
    // A digest is enough, and the tag beside it is left out.
    if let Some((before, digest)) = whole.split_once('@') {
        let before = tag(before).and_then(|at| before.get(..at)).unwrap_or(before);
        return format!("{before}@{digest}");
    }
    if tag(&whole).is_none() {
        whole.push_str(":latest");
    }
    whole
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[test]
    fn short_names_are_looked_up_as_containerd_calls_the_image() {
        for (name, expected) in [
            ("app", "docker.io/library/app:latest"),
            ("app:1", "docker.io/library/app:1"),
            ("user/app", "docker.io/user/app:latest"),
            ("localhost/app", "localhost/app:latest"),
            ("localhost:5000/app", "localhost:5000/app:latest"),
            ("registry.example/a/b:1", "registry.example/a/b:1"),
            ("app:1@sha256:00", "docker.io/library/app@sha256:00"),
            ("localhost:5000/app@sha256:00", "localhost:5000/app@sha256:00"),
        ] {
            assert_eq!(whole(name), expected, "{name}");
        }
    }

    fn names(all: &[(&str, &str)]) -> BTreeMap<String, String> {
        all.iter().map(|(id, name)| ((*id).to_owned(), (*name).to_owned())).collect()
    }

    #[tokio::test]
    async fn a_containerd_that_says_nothing_costs_its_time_and_no_more() {
        let dir = tempfile::tempdir().unwrap();
        let address = dir.path().join("s");
        // Connections are taken by the kernel, and nobody speaks.
        let _silent = std::os::unix::net::UnixListener::bind(&address).unwrap();
        for address in [address, dir.path().join("none"), "".into()] {
            let containerd = ContainerdConfig { address, timeout: Duration::from_millis(50) };
            let origins = Origins::default();
            let mut shown = Map::from_iter([("c".to_owned(), json!({}))]);
            let names = names(&[("c", "app")]);
            let add = origins.add(&containerd, "", &names, &mut shown);
            tokio::time::timeout(Duration::from_secs(10), add).await.unwrap();
            assert_eq!(shown["c"], json!({}));
        }
    }

    #[tokio::test]
    async fn what_is_known_is_not_asked_for_and_what_has_gone_is_forgotten() {
        let never = ContainerdConfig { address: "".into(), timeout: Duration::from_secs(1) };
        let origins = Origins::default();
        let all = [("c", "app"), ("d", "app")];
        for id in ["c", "d"] {
            origins.0.lock().unwrap().insert(id.into(), json!({ "kind": "rootfs" }));
        }
        assert!(origins.known(&names(&all)).1.is_empty());
        let mut shown = Map::from_iter([("c".to_owned(), json!({}))]);
        origins.add(&never, "", &names(&all[..1]), &mut shown).await;
        assert_eq!(shown["c"]["image"]["kind"], "rootfs");
        assert_eq!(origins.0.lock().unwrap().len(), 1);
        assert_eq!(origins.known(&names(&all)).1["app"], ["d"]);
    }
}
