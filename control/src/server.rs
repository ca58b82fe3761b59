//! The gRPC service on a unix socket: hands requests to the reconciler and answers back.
//!
//! No logic of its own. Who is at the other end is read from the socket and goes into the audit log.

mod socket;
mod watch;

use std::path::PathBuf;
use std::pin::Pin;
use std::time::Duration;

use sluice_pipeline::tables::LAYOUT_VERSION;
use sluice_proto::FILE_DESCRIPTOR_SET;
use sluice_proto::v1;
use sluice_proto::v1::sluice_server::{Sluice, SluiceServer};
use tokio::net::UnixListener;
use tokio::sync::oneshot;
use tokio_stream::Stream;
use tokio_stream::wrappers::UnixListenerStream;
use tonic::transport::Server;
use tonic::transport::server::UdsConnectInfo;
use tonic::{Request, Response, Status};

use crate::core::Outcome;
use crate::doctor;
use crate::error::Error;
use crate::reconcile::Handle;
use crate::resource::{Key, Kind};
use crate::vf::fleet::Settled;

pub use socket::{SocketError, bind};

/// Largest message that is taken or given: an ACL group of 100 000 rules is about 10 MB.
pub const MESSAGE_MAX: usize = 256 << 20;

/// How long an apply waits for the NICs to act upon it.
const APPLY_MAX: Duration = Duration::from_secs(5);
/// How long a NIC, and the guest on it, may take to answer.
const NIC_MAX: Duration = Duration::from_secs(60);

/// What the daemon knows of itself.
#[derive(Clone, Debug)]
pub struct Identity {
    /// Name of the instance.
    pub instance: String,
    /// State directory.
    pub state_dir: PathBuf,
    /// Runtime directory.
    pub runtime_dir: PathBuf,
    /// Pin directory.
    pub pin_dir: PathBuf,
    /// The socket.
    pub socket: PathBuf,
}

/// The service.
#[derive(Clone)]
pub struct Api {
    handle: Handle,
    identity: Identity,
}

impl Api {
    /// A service in front of this reconciler.
    pub fn new(handle: Handle, identity: Identity) -> Api {
        Api { handle, identity }
    }
}

impl Api {
    /// Waits until the NICs have acted upon a revision: until then a VF may still pass what the new policy forbids.
    /// `false` if there was nothing to wait for.
    async fn nics_settle(&self, revision: u64) -> bool {
        let mut view = self.handle.view();
        let deadline = tokio::time::Instant::now() + APPLY_MAX;
        let mut waited = false;
        while view.borrow_and_update().settled < revision {
            waited = true;
            let changed = tokio::time::timeout_at(deadline, view.changed());
            if !matches!(changed.await, Ok(Ok(()))) {
                break;
            }
        }
        waited
    }

    /// Where a vNIC is, once its NIC's thread has answered.
    async fn settled(
        &self,
        vnic: String,
        settled: Option<oneshot::Receiver<Settled>>,
    ) -> Result<v1::PathStatus, Error> {
        if let Some(settled) = settled {
            // What the thread answers it has reported before, so the core has it when it is asked now: then whoever
            // reads the vNIC next sees the same.
            let _ = within(NIC_MAX, settled).await?;
        }
        self.handle.call(move |core| core.path_of(&vnic)).await
    }
}

/// Waits for a NIC's thread.
async fn within<T>(time: Duration, answer: oneshot::Receiver<T>) -> Result<T, Error> {
    match tokio::time::timeout(time, answer).await {
        Ok(Ok(answer)) => Ok(answer),
        Ok(Err(_)) => Err(Error::Unavailable("the NIC's thread has ended; ask again".to_owned())),
        Err(_) => Err(Error::Unavailable(format!(
            "the NIC or the guest has not answered within {} s; `sluice explain` says what is waited for",
            time.as_secs()
        ))),
    }
}

/// Why the server ended early.
#[derive(Debug, thiserror::Error)]
pub enum ServeError {
    /// The transport.
    #[error("server: {0}")]
    Transport(#[from] tonic::transport::Error),
    /// Reflection.
    #[error("reflection: {0}")]
    Reflection(#[from] tonic_reflection::server::Error),
}

/// Serves the API, with health and reflection, until `stop` is done and every request is answered.
///
/// # Errors
/// [`ServeError`].
pub async fn serve(
    listener: UnixListener,
    api: Api,
    stop: impl Future<Output = ()>,
) -> Result<(), ServeError> {
    let api =
        SluiceServer::new(api).max_decoding_message_size(MESSAGE_MAX).max_encoding_message_size(MESSAGE_MAX);
    let (health, health_service) = tonic_health::server::health_reporter();
    health.set_serving::<SluiceServer<Api>>().await;
    let reflection = tonic_reflection::server::Builder::configure()
        .register_encoded_file_descriptor_set(FILE_DESCRIPTOR_SET)
        .register_encoded_file_descriptor_set(tonic_health::pb::FILE_DESCRIPTOR_SET)
        .build_v1()?;
    let server = Server::builder().add_service(health_service).add_service(reflection).add_service(api);
    Ok(server.serve_with_incoming_shutdown(UnixListenerStream::new(listener), stop).await?)
}

fn actor<T>(request: &Request<T>) -> String {
    let peer = request.extensions().get::<UdsConnectInfo>().and_then(|info| info.peer_cred);
    match peer {
        Some(peer) => match peer.pid() {
            Some(pid) => format!("uid {}, pid {pid}", peer.uid()),
            None => format!("uid {}", peer.uid()),
        },
        None => "unknown".to_owned(),
    }
}

fn wanted_kind(kind: &str) -> Result<Option<Kind>, Error> {
    if kind.is_empty() { Ok(None) } else { Ok(Some(kind.parse()?)) }
}

#[tonic::async_trait]
impl Sluice for Api {
    async fn apply(&self, request: Request<v1::ApplyRequest>) -> Result<Response<v1::ApplyResponse>, Status> {
        let actor = actor(&request);
        let request = request.into_inner();
        let Outcome { revision, mut results, data_plane } =
            self.handle.call(move |core| core.apply(&request, &actor)).await?;
        if self.nics_settle(revision).await {
            let view = self.handle.view().borrow().clone();
            for result in &mut results {
                let known =
                    result.resource.parse().ok().and_then(|key: Key| view.resources.get(&key).cloned());
                if let Some(known) = known {
                    result.status = known.status.clone();
                }
            }
        }
        Ok(Response::new(v1::ApplyResponse { revision, results, data_plane }))
    }

    async fn plan(&self, request: Request<v1::PlanRequest>) -> Result<Response<v1::PlanResponse>, Status> {
        let request = request.into_inner();
        Ok(Response::new(self.handle.call(move |core| core.plan(&request)).await?))
    }

    async fn delete(
        &self,
        request: Request<v1::DeleteRequest>,
    ) -> Result<Response<v1::DeleteResponse>, Status> {
        let actor = actor(&request);
        let request = request.into_inner();
        let Outcome { revision, data_plane, .. } =
            self.handle.call(move |core| core.delete(&request, &actor)).await?;
        self.nics_settle(revision).await;
        Ok(Response::new(v1::DeleteResponse { revision, data_plane }))
    }

    async fn list(&self, request: Request<v1::ListRequest>) -> Result<Response<v1::ListResponse>, Status> {
        let kind = wanted_kind(&request.get_ref().kind)?;
        let view = self.handle.view().borrow().clone();
        let resources = view.resources.iter().filter(|(key, _)| kind.is_none_or(|kind| key.kind == kind));
        Ok(Response::new(v1::ListResponse {
            resources: resources.map(|(_, resource)| resource.as_ref().clone()).collect(),
            revision: view.revision,
        }))
    }

    async fn get(&self, request: Request<v1::GetRequest>) -> Result<Response<v1::GetResponse>, Status> {
        let reference = request.into_inner().resource.unwrap_or_default();
        let key = Key::new(reference.kind.parse().map_err(Error::from)?, reference.name);
        let view = self.handle.view().borrow().clone();
        let resource = view.resources.get(&key).ok_or_else(|| Error::no_such(&key))?;
        Ok(Response::new(v1::GetResponse { resource: Some(resource.as_ref().clone()) }))
    }

    type WatchStream = Pin<Box<dyn Stream<Item = Result<v1::WatchResponse, Status>> + Send>>;

    async fn watch(&self, request: Request<v1::WatchRequest>) -> Result<Response<Self::WatchStream>, Status> {
        let kind = wanted_kind(&request.get_ref().kind)?;
        Ok(Response::new(Box::pin(watch::changes(self.handle.view(), kind))))
    }

    async fn get_stats(
        &self,
        request: Request<v1::GetStatsRequest>,
    ) -> Result<Response<v1::GetStatsResponse>, Status> {
        let request = request.into_inner();
        Ok(Response::new(self.handle.call(move |core| core.stats(&request)).await?))
    }

    async fn get_fdb(
        &self,
        request: Request<v1::GetFdbRequest>,
    ) -> Result<Response<v1::GetFdbResponse>, Status> {
        let request = request.into_inner();
        Ok(Response::new(self.handle.call(move |core| core.fdb(&request)).await?))
    }

    async fn get_drops(
        &self,
        _request: Request<v1::GetDropsRequest>,
    ) -> Result<Response<v1::GetDropsResponse>, Status> {
        Ok(Response::new(self.handle.call(|core| core.drops()).await?))
    }

    async fn trace(&self, request: Request<v1::TraceRequest>) -> Result<Response<v1::TraceResponse>, Status> {
        let request = request.into_inner();
        Ok(Response::new(self.handle.call(move |core| core.trace(&request)).await?))
    }

    async fn doctor(
        &self,
        _request: Request<v1::DoctorRequest>,
    ) -> Result<Response<v1::DoctorResponse>, Status> {
        let identity = self.identity.clone();
        let findings = self.handle.call(move |core| Ok(doctor::examine(core, &identity))).await?;
        Ok(Response::new(v1::DoctorResponse { findings }))
    }

    async fn explain(
        &self,
        request: Request<v1::ExplainRequest>,
    ) -> Result<Response<v1::ExplainResponse>, Status> {
        let vnic = request.into_inner().vnic;
        Ok(Response::new(self.handle.call(move |core| core.explain(&vnic)).await?))
    }

    async fn revoke_vf(
        &self,
        request: Request<v1::RevokeVfRequest>,
    ) -> Result<Response<v1::RevokeVfResponse>, Status> {
        let actor = actor(&request);
        let request = request.into_inner();
        let vnic = request.vnic.clone();
        let settled = self.handle.call(move |core| core.revoke_vf(&request, &actor)).await?;
        Ok(Response::new(v1::RevokeVfResponse { path: Some(self.settled(vnic, settled).await?) }))
    }

    async fn release_vf(
        &self,
        request: Request<v1::ReleaseVfRequest>,
    ) -> Result<Response<v1::ReleaseVfResponse>, Status> {
        let vnic = request.into_inner().vnic;
        let name = vnic.clone();
        let settled = self.handle.call(move |core| core.release_vf(&name)).await?;
        Ok(Response::new(v1::ReleaseVfResponse { path: Some(self.settled(vnic, settled).await?) }))
    }

    async fn acknowledge_vf(
        &self,
        request: Request<v1::AcknowledgeVfRequest>,
    ) -> Result<Response<v1::AcknowledgeVfResponse>, Status> {
        let answer = request.into_inner();
        if answer.outcome() == v1::acknowledge_vf_request::Outcome::Unspecified {
            return Err(Status::invalid_argument("outcome: say DONE or REFUSED"));
        }
        let accepted = match self.handle.call(move |core| core.acknowledge_vf(answer)).await? {
            Some(accepted) => within(NIC_MAX, accepted).await?,
            None => false,
        };
        Ok(Response::new(v1::AcknowledgeVfResponse { accepted }))
    }

    async fn probe_uplink(
        &self,
        request: Request<v1::ProbeUplinkRequest>,
    ) -> Result<Response<v1::ProbeUplinkResponse>, Status> {
        let switch = request.into_inner().switch;
        let name = switch.clone();
        let Some(found) = self.handle.call(move |core| core.probe_uplink(&name)).await? else {
            let text = format!(
                "nobody looks after the NIC of switch {switch}: it needs an uplink, and a vNIC with `sriov`, first"
            );
            return Err(Error::Unavailable(text).into());
        };
        Ok(Response::new(within(NIC_MAX, found).await?.map_err(Error::Unavailable)?))
    }

    async fn list_workers(
        &self,
        _request: Request<v1::ListWorkersRequest>,
    ) -> Result<Response<v1::WorkersStatus>, Status> {
        Ok(Response::new(self.handle.call(|core| Ok(core.workers())).await?))
    }

    async fn set_workers(
        &self,
        request: Request<v1::SetWorkersRequest>,
    ) -> Result<Response<v1::WorkersStatus>, Status> {
        let actor = actor(&request);
        let request = request.into_inner();
        Ok(Response::new(self.handle.call(move |core| core.set_workers(&request, &actor)).await?))
    }

    async fn place_queue(
        &self,
        request: Request<v1::PlaceQueueRequest>,
    ) -> Result<Response<v1::WorkersStatus>, Status> {
        let actor = actor(&request);
        let request = request.into_inner();
        Ok(Response::new(self.handle.call(move |core| core.place_queue(&request, &actor)).await?))
    }

    async fn get_version(
        &self,
        _request: Request<v1::GetVersionRequest>,
    ) -> Result<Response<v1::GetVersionResponse>, Status> {
        Ok(Response::new(v1::GetVersionResponse {
            version: env!("CARGO_PKG_VERSION").to_owned(),
            pid: std::process::id(),
            instance: self.identity.instance.clone(),
            revision: self.handle.view().borrow().revision,
            layout: LAYOUT_VERSION,
        }))
    }
}

#[cfg(test)]
pub(crate) mod tests;
