//! Why the daemon refuses a request or fails at it, and which gRPC code that is.

use prost::Message;
use sluice_kernel::EngineError;
use sluice_policy::lower::LowerError;
use sluice_policy::validate;
use sluice_proto::v1;
use sluice_user::workers::WorkersError;
use tonic::{Code, Status};

use crate::engine::UserError;
use crate::resource::{Key, UnknownKind};
use crate::store::StoreError;

/// Why a request was not served. Nothing was changed, unless the variant says otherwise.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The desired state would not make sense.
    #[error("refused, nothing was changed: {}", summary(.0))]
    Invalid(Vec<v1::Violation>),
    /// Resources are at other revisions than the caller expected.
    #[error("refused, nothing was changed: {}", summary(.0))]
    Revision(Vec<v1::Violation>),
    /// What should be deleted is still needed.
    #[error("refused, nothing was changed: {}", summary(.0))]
    StillReferenced(Vec<v1::Violation>),
    /// What the request names does not exist.
    #[error("{}", summary(.0))]
    NotFound(Vec<v1::Violation>),
    /// The tables cannot hold it.
    #[error("refused, nothing was changed: {0}")]
    Lower(#[from] LowerError),
    /// A word that is not a kind of resource.
    #[error(transparent)]
    Kind(#[from] UnknownKind),
    /// The state could not be stored.
    #[error("nothing was changed: {0}")]
    Store(#[from] StoreError),
    /// The engine failed. The desired state stands and is tried again.
    #[error(transparent)]
    Engine(#[from] EngineError),
    /// The userspace engine refuses; nothing was changed.
    #[error("workers: {0}")]
    Workers(#[from] UserError),
    /// It cannot be done now.
    #[error("{0}")]
    Unavailable(String),
    /// The daemon is stopping.
    #[error("the daemon is stopping; try again")]
    Stopping,
}

fn summary(violations: &[v1::Violation]) -> String {
    let Some(first) = violations.first() else {
        return "no reason was given".to_owned();
    };
    let place = if first.field.is_empty() { String::new() } else { format!("{}: ", first.field) };
    let more = match violations.len() {
        1 => String::new(),
        count => format!(" (and {} more)", count - 1),
    };
    format!("{}: {place}{}{more}", first.resource, first.message)
}

impl Error {
    /// A resource that does not exist.
    pub fn no_such(key: &Key) -> Error {
        let kind = key.kind.singular();
        Error::NotFound(vec![violation(
            key.to_string(),
            format!("there is no such {kind}; see `sluice get {kind}`"),
            v1::violation::Code::NotFound,
        )])
    }

    fn code(&self) -> Code {
        match self {
            Error::Invalid(_) | Error::Kind(_) => Code::InvalidArgument,
            Error::Revision(_) => Code::Aborted,
            Error::StillReferenced(_) => Code::FailedPrecondition,
            Error::NotFound(_) => Code::NotFound,
            Error::Lower(LowerError::TooMany { .. }) => Code::ResourceExhausted,
            Error::Lower(LowerError::MaskCollision { .. }) => Code::InvalidArgument,
            Error::Lower(LowerError::Unnumbered { .. }) => Code::Internal,
            Error::Store(_) => Code::Internal,
            Error::Engine(EngineError::TableFull { .. }) => Code::ResourceExhausted,
            Error::Workers(UserError::Workers(error)) => match error {
                WorkersError::NoCores => Code::InvalidArgument,
                WorkersError::NoWorker { .. } | WorkersError::NotPlaced(_) => Code::NotFound,
                WorkersError::Placed(_) => Code::AlreadyExists,
                WorkersError::Start { .. } => Code::FailedPrecondition,
                WorkersError::Watch { .. } => Code::ResourceExhausted,
                WorkersError::Died(_) => Code::Internal,
            },
            Error::Workers(_) => Code::Internal,
            Error::Unavailable(_) => Code::FailedPrecondition,
            Error::Engine(_) | Error::Stopping => Code::Unavailable,
        }
    }

    fn violations(&self) -> &[v1::Violation] {
        match self {
            Error::Invalid(found)
            | Error::Revision(found)
            | Error::StillReferenced(found)
            | Error::NotFound(found) => found,
            Error::Lower(_)
            | Error::Kind(_)
            | Error::Store(_)
            | Error::Engine(_)
            | Error::Workers(_)
            | Error::Unavailable(_)
            | Error::Stopping => &[],
        }
    }
}

/// A violation that concerns a whole resource.
pub fn violation(resource: String, message: String, code: v1::violation::Code) -> v1::Violation {
    v1::Violation { resource, field: String::new(), message, code: code.into() }
}

/// A violation that validation or conversion found.
pub fn from_policy(found: validate::Violation) -> v1::Violation {
    use validate::ViolationCode as Code;
    let code = match found.code {
        Code::Invalid => v1::violation::Code::Invalid,
        Code::OutOfRange => v1::violation::Code::OutOfRange,
        Code::Missing => v1::violation::Code::Missing,
        Code::Duplicate => v1::violation::Code::Duplicate,
        Code::NotFound => v1::violation::Code::UnknownReference,
        Code::Conflict => v1::violation::Code::Conflict,
        Code::Limit => v1::violation::Code::Limit,
        _ => v1::violation::Code::Unspecified,
    };
    v1::Violation { resource: found.resource, field: found.field, message: found.message, code: code.into() }
}

const DETAILS_TYPE: &str = "type.googleapis.com/sluice.v1.ErrorDetails";

impl From<Error> for Status {
    fn from(error: Error) -> Status {
        let (code, message) = (error.code(), error.to_string());
        if error.violations().is_empty() {
            return Status::new(code, message);
        }
        let details = v1::ErrorDetails { violations: error.violations().to_vec() };
        let details = prost_types::Any { type_url: DETAILS_TYPE.to_owned(), value: details.encode_to_vec() };
        let status = v1::RpcStatus { code: code.into(), message: message.clone(), details: vec![details] };
        Status::with_details(code, message, status.encode_to_vec().into())
    }
}

/// The violations that a status carries; none if it carries none.
pub fn violations_of(status: &Status) -> Vec<v1::Violation> {
    let details = v1::RpcStatus::decode(status.details()).map(|status| status.details).unwrap_or_default();
    let details = details.into_iter().filter(|any| any.type_url == DETAILS_TYPE);
    details
        .filter_map(|any| v1::ErrorDetails::decode(any.value.as_slice()).ok())
        .flat_map(|details| details.violations)
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::resource::Kind;

    #[test]
    fn violations_travel_in_the_status() {
        let status = Status::from(Error::no_such(&Key::new(Kind::Vnic, "vm1")));
        assert_eq!(status.code(), Code::NotFound);
        assert_eq!(status.message(), "vnics/vm1: there is no such vnic; see `sluice get vnic`");
        let found = violations_of(&status);
        assert_eq!(found.len(), 1);
        assert_eq!(found[0].resource, "vnics/vm1");
        assert_eq!(found[0].code(), v1::violation::Code::NotFound);
        assert!(violations_of(&Status::from(Error::Stopping)).is_empty());
    }
}
