//! Between our types and the messages on the wire.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use protobuf::MessageField;
use protobuf::well_known_types::any::Any;
use protobuf::well_known_types::timestamp::Timestamp;

use crate::error::{Error, Result};

/// A time as protobuf has it.
pub(crate) fn timestamp(at: SystemTime) -> MessageField<Timestamp> {
    MessageField::some(Timestamp::from(at))
}

/// An Any of this type.
pub(crate) fn any(type_url: impl Into<String>, value: Vec<u8>) -> Any {
    Any { type_url: type_url.into(), value, ..Default::default() }
}

/// gRPC's `grpc-timeout`: up to 8 digits and a unit.
pub(crate) fn grpc_timeout(text: &str) -> Option<Duration> {
    let unit = text.chars().next_back()?;
    let digits = text.strip_suffix(unit)?;
    if digits.is_empty() || digits.len() > 8 || !digits.bytes().all(|b| b.is_ascii_digit()) {
        return None;
    }
    let n: u64 = digits.parse().ok()?;
    Some(match unit {
        'H' => Duration::from_secs(n * 3600),
        'M' => Duration::from_secs(n * 60),
        'S' => Duration::from_secs(n),
        'm' => Duration::from_millis(n),
        'u' => Duration::from_micros(n),
        'n' => Duration::from_nanos(n),
        _ => return None,
    })
}

/// RFC 3339 in UTC with nanoseconds, as Go prints a time.
pub(crate) fn rfc3339(at: SystemTime) -> String {
    let since = at.duration_since(UNIX_EPOCH).unwrap_or_default();
    let (secs, nanos) = (since.as_secs(), since.subsec_nanos());
    let (days, s) = (secs / 86_400, secs % 86_400);
    // Howard Hinnant's days-to-civil, for days since 1970.
    let z = days + 719_468;
    let era = z / 146_097;
    let doe = z % 146_097;
    let yoe = (doe - doe / 1460 + doe / 36_524 - doe / 146_096) / 365;
    let doy = doe - (365 * yoe + yoe / 4 - yoe / 100);
    let mp = (5 * doy + 2) / 153;
    let (day, month) = (doy - (153 * mp + 2) / 5 + 1, if mp < 10 { mp + 3 } else { mp - 9 });
    let year = yoe + era * 400 + u64::from(month <= 2);
    let (h, m, s) = (s / 3600, s / 60 % 60, s % 60);
    format!("{year:04}-{month:02}-{day:02}T{h:02}:{m:02}:{s:02}.{nanos:09}Z")
}

/// How an error looks to a gRPC client.
pub(crate) fn status(e: &Error) -> tonic::Status {
    tonic::Status::new(e.code(), e.chain())
}

/// How an error looks to a ttrpc client.
pub fn ttrpc_error(e: &Error) -> ttrpc::Error {
    use ttrpc::Code as C;
    let code = match e {
        Error::NotFound(_) => C::NOT_FOUND,
        Error::AlreadyExists(_) => C::ALREADY_EXISTS,
        Error::InvalidArgument(_) => C::INVALID_ARGUMENT,
        Error::FailedPrecondition(_) => C::FAILED_PRECONDITION,
        Error::ResourceExhausted(_) => C::RESOURCE_EXHAUSTED,
        Error::Unimplemented(_) => C::UNIMPLEMENTED,
        Error::DeadlineExceeded(_) => C::DEADLINE_EXCEEDED,
        Error::Unavailable(_) => C::UNAVAILABLE,
        Error::Internal { .. } => C::INTERNAL,
    };
    ttrpc::Error::RpcStatus(ttrpc::get_status(code, e.chain()))
}

/// Checks a sandbox id.
pub(crate) fn check_id(id: &str) -> Result<()> {
    kuasar_host::id::check("sandbox", id)
        .map(drop)
        .map_err(|e| Error::InvalidArgument(e.to_string()))
}

/// The text of a panic.
pub(crate) fn panic_text(panic: Box<dyn std::any::Any + Send>) -> String {
    match panic.downcast::<String>() {
        Ok(text) => *text,
        Err(panic) => panic.downcast_ref::<&str>().unwrap_or(&"no text").to_string(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_grpc_timeout_is_read_in_every_unit_and_nothing_else_is() {
        assert_eq!(grpc_timeout("5S"), Some(Duration::from_secs(5)));
        assert_eq!(grpc_timeout("99999999H"), Some(Duration::from_secs(99_999_999 * 3600)));
        assert_eq!(grpc_timeout("250m"), Some(Duration::from_millis(250)));
        for bad in ["", "S", "5", "5x", "123456789S", "-1S", "5é"] {
            assert_eq!(grpc_timeout(bad), None, "{bad:?}");
        }
    }

    #[test]
    fn times_are_printed_as_go_prints_them() {
        let at = UNIX_EPOCH + Duration::new(1_709_164_799, 5);
        assert_eq!(rfc3339(at), "2024-02-28T23:59:59.000000005Z");
        assert_eq!(rfc3339(at + Duration::from_secs(1)), "2024-02-29T00:00:00.000000005Z");
        assert_eq!(rfc3339(UNIX_EPOCH), "1970-01-01T00:00:00.000000000Z");
    }
}
