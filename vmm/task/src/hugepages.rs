//! Huge pages of containers (Linux documentation, admin-guide/mm/hugetlbpage).
//!
//! No pool is set aside. Once something asks for huge pages, a volume of them or a container's limit, the
//! kernel may make them of free memory whenever they are mapped (`nr_overcommit_hugepages`), and takes
//! them apart again afterwards. Not before: they are memory that no memory limit counts, and a pod that
//! wants none is to have none. What bounds a container then is its own limit of huge pages, if it has one,
//! and the machine.
//!
//! Pages of 1 GiB cannot be made that way, and hardly otherwise once a machine runs.

use std::io;
use std::path::Path;

use containerd_task::error::{Error, Result};
use serde_json::{Map, Value};

const SYS: &str = "/sys/kernel/mm/hugepages";
/// Pages of a size at a time. What there can really be is the machine's memory.
const PAGES: u32 = u32::MAX;

/// Bytes of a size as runtime specs (`2MB`) and mount options (`2M`, `2097152`) write it.
fn bytes(size: &str) -> Option<u64> {
    let digits = size.find(|c: char| !c.is_ascii_digit()).unwrap_or(size.len());
    let (number, unit) = size.split_at_checked(digits)?;
    let shift = match unit.strip_suffix('B').unwrap_or(unit) {
        "" => 0,
        "K" | "k" => 10,
        "M" | "m" => 20,
        "G" | "g" => 30,
        _ => return None,
    };
    let bytes = number.parse::<u64>().ok()?.checked_mul(1 << shift)?;
    (bytes >= 4096 && bytes.is_power_of_two()).then_some(bytes)
}

fn is_known(sys: &Path, bytes: u64) -> bool {
    sys.join(format!("hugepages-{}kB", bytes >> 10)).is_dir()
}

/// Lets there be pages of this size.
fn allow(sys: &Path, size: &str) -> Result<()> {
    let wrong = || Error::InvalidArgument(format!("{size:.40?} is no size of huge pages"));
    let bytes = bytes(size).ok_or_else(wrong)?;
    let file = sys.join(format!("hugepages-{}kB/nr_overcommit_hugepages", bytes >> 10));
    std::fs::write(&file, PAGES.to_string()).map_err(|error| match error.kind() {
        io::ErrorKind::NotFound => Error::FailedPrecondition(format!(
            "the guest's kernel has no huge pages of {size:.40}: use another size, or a pod without VM"
        )),
        io::ErrorKind::InvalidInput => Error::FailedPrecondition(format!(
            "huge pages of {size:.40} cannot be made in a running guest: use those of 2 MiB, or a pod \
             without VM"
        )),
        _ => Error::internal(format!("allow huge pages of {size:.40}"), error),
    })
}

/// For a volume with these mount options.
///
/// # Errors
/// [`Error::FailedPrecondition`] for a size that there cannot be.
pub fn for_volume(options: &[String]) -> Result<()> {
    let size = options.iter().find_map(|option| option.strip_prefix("pagesize="));
    // The kernel's default on the architectures that we run on.
    allow(Path::new(SYS), size.unwrap_or("2M"))
}

/// For the limits among `resources` (of a runtime spec). A size that this kernel lacks, of which the
/// container may have nothing, is left out: its cgroup has no file for it.
///
/// # Errors
/// [`Error::FailedPrecondition`] for a size that there cannot be.
pub fn for_container(resources: &mut Map<String, Value>) -> Result<()> {
    limits(Path::new(SYS), resources)
}

fn limits(sys: &Path, resources: &mut Map<String, Value>) -> Result<()> {
    let Some(list) = resources.get_mut("hugepageLimits").and_then(Value::as_array_mut) else {
        return Ok(());
    };
    let size = |entry: &Value| {
        entry.get("pageSize").and_then(Value::as_str).unwrap_or_default().to_owned()
    };
    let some = |entry: &Value| entry.get("limit").and_then(Value::as_u64).unwrap_or(0) > 0;
    for entry in list.iter().filter(|entry| some(entry)) {
        allow(sys, &size(entry))?;
    }
    list.retain(|entry| some(entry) || bytes(&size(entry)).is_some_and(|b| is_known(sys, b)));
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn sizes_are_read_as_everybody_writes_them() {
        for (text, expected) in [
            ("2MB", Some(2 << 20)),
            ("2M", Some(2 << 20)),
            ("2097152", Some(2 << 20)),
            ("64KB", Some(64 << 10)),
            ("1GB", Some(1 << 30)),
            ("", None),
            ("MB", None),
            ("3MB", None),
            ("2TB", None),
            ("2MB/../x", None),
            ("99999999999999999999", None),
            ("17179869184G", None),
        ] {
            assert_eq!(bytes(text), expected, "{text}");
        }
    }

    #[test]
    fn only_what_is_asked_for_is_allowed_and_unknown_sizes_without_a_page_go() {
        let sys = tempfile::tempdir().unwrap();
        let file = sys.path().join("hugepages-2048kB/nr_overcommit_hugepages");
        std::fs::create_dir(file.parent().unwrap()).unwrap();
        std::fs::write(&file, "0").unwrap();
        let limit = |size: &str, limit: u64| json!({"pageSize": size, "limit": limit});
        let of = |limits: &[Value]| {
            let value = json!({"hugepageLimits": limits, "pids": {}});
            value.as_object().unwrap().clone()
        };
        let mut none = of(&[limit("1GB", 0), limit("2MB", 0)]);
        limits(sys.path(), &mut none).unwrap();
        assert_eq!(none, of(&[limit("2MB", 0)]));
        assert_eq!(std::fs::read_to_string(&file).unwrap(), "0");
        let mut some = of(&[limit("2MB", 4 << 20)]);
        limits(sys.path(), &mut some).unwrap();
        assert_eq!(some, of(&[limit("2MB", 4 << 20)]));
        assert_eq!(std::fs::read_to_string(&file).unwrap(), PAGES.to_string());
        let error = limits(sys.path(), &mut of(&[limit("1GB", 1)])).unwrap_err();
        assert!(
            matches!(&error, Error::FailedPrecondition(text) if text.contains("1GB")),
            "{error}"
        );
        let error = limits(sys.path(), &mut of(&[limit("../x", 1)])).unwrap_err();
        assert!(matches!(error, Error::InvalidArgument(_)), "{error}");
        limits(sys.path(), &mut Map::new()).unwrap();
    }
}
