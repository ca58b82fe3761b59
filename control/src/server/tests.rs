//! The API over a real socket, with the fake engine behind it.

use std::time::Duration;

use sluice_proto::v1::sluice_client::SluiceClient;
use tonic::Code;
use tonic::transport::Channel;
use tonic_health::pb::health_check_response::ServingStatus;
use tonic_health::pb::health_client::HealthClient;
use tonic_reflection::pb::v1::server_reflection_client::ServerReflectionClient;
use tonic_reflection::pb::v1::server_reflection_request::MessageRequest;
use tonic_reflection::pb::v1::server_reflection_response::MessageResponse;
use tonic_reflection::pb::v1::{ListServiceResponse, ServerReflectionRequest};

use super::*;
use crate::cli::client::{channel, connect};
use crate::core::Core;
use crate::engine::fake::FakeEngine;
use crate::error::violations_of;
use crate::json::read_config;
use crate::reconcile;
use crate::store::{Store, StoreError};

const PATIENCE: Duration = Duration::from_secs(20);
const BLUE: &str = "switches: [{name: blue, uplink: {netdev: up0}}]";

/// A served API; everything ends with it.
pub(crate) struct Bench {
    dir: tempfile::TempDir,
    engine: FakeEngine,
    pub(crate) handle: Handle,
    _stop: tokio::sync::oneshot::Sender<()>,
}

impl Bench {
    pub(crate) async fn start() -> Bench {
        let dir = tempfile::tempdir().expect("a directory");
        let engine = FakeEngine::with_netdevs(&["up0", "p1"]);
        let (state_dir, runtime_dir) = (dir.path().join("state"), dir.path().join("run"));
        let identity = Identity {
            instance: "test".to_owned(),
            state_dir: state_dir.clone(),
            runtime_dir: runtime_dir.clone(),
            pin_dir: dir.path().join("pins"),
            socket: dir.path().join("socket"),
        };
        let behind = engine.clone();
        let make = move || -> Result<Core, StoreError> {
            let (store, state, origin) = Store::open(&state_dir, &runtime_dir)?;
            Ok(Core::new(store, state, origin, Box::new(behind)))
        };
        let (handle, _) = reconcile::start(make, None).expect("started");
        let listener = bind(&identity.socket, 0o600).expect("bound");
        let (stop, stopped) = tokio::sync::oneshot::channel();
        tokio::spawn(serve(listener, Api::new(handle.clone(), identity), async {
            let _ = stopped.await;
        }));
        Bench { dir, engine, handle, _stop: stop }
    }

    pub(crate) fn socket(&self) -> PathBuf {
        self.dir.path().join("socket")
    }

    pub(crate) async fn apply(&self, yaml: &str) {
        self.client().await.apply(apply(yaml)).await.expect("applied");
    }

    async fn channel(&self) -> Channel {
        channel(&self.socket()).await.expect("connected")
    }

    async fn client(&self) -> SluiceClient<Channel> {
        connect(&self.socket()).await.expect("connected")
    }
}

impl Drop for Bench {
    fn drop(&mut self) {
        self.handle.stop();
    }
}

fn apply(yaml: &str) -> v1::ApplyRequest {
    v1::ApplyRequest { config: Some(read_config(yaml).expect("good YAML")), ..v1::ApplyRequest::default() }
}

fn reference(kind: &str, name: &str) -> v1::ResourceRef {
    v1::ResourceRef { kind: kind.to_owned(), name: name.to_owned() }
}

#[tokio::test]
async fn requests_are_answered_and_refusals_carry_violations() {
    let bench = Bench::start().await;
    let mut client = bench.client().await;
    let answer = client.apply(apply(BLUE)).await.expect("applied").into_inner();
    assert_eq!((answer.revision, answer.results.len()), (1, 1));
    let request = v1::GetRequest { resource: Some(reference("switch", "blue")) };
    let found = client.get(request).await.expect("there").into_inner().resource.expect("given");
    assert_eq!(found.status.expect("given").ports[0].state(), v1::port_status::State::Attached);

    let vnic = |name: &str| {
        format!("vnics: [{{name: {name}, switch: blue, attach: {{veth: {name}}}, mac: '02:00:00:00:00:01'}}]")
    };
    client.apply(apply(&vnic("a"))).await.expect("applied");
    let status = client.apply(apply(&vnic("b"))).await.expect_err("the same MAC");
    assert_eq!(status.code(), Code::InvalidArgument);
    let found = violations_of(&status);
    assert_eq!((found[0].resource.as_str(), found[0].field.as_str()), ("vnics/b", "mac"));
    assert_eq!(found[0].code(), v1::violation::Code::Duplicate);

    let delete = |kind: &str, name: &str| v1::DeleteRequest {
        resources: vec![reference(kind, name)],
        ..v1::DeleteRequest::default()
    };
    let status = client.delete(delete("switch", "blue")).await.expect_err("still used");
    assert_eq!(status.code(), Code::FailedPrecondition);
    assert!(status.message().contains("vnics/a"), "{}", status.message());
    let status = client.delete(delete("vnic", "b")).await.expect_err("not there");
    assert_eq!(status.code(), Code::NotFound);
    let status = client.delete(delete("router", "b")).await.expect_err("no such kind");
    assert_eq!(status.code(), Code::InvalidArgument);
    let request =
        v1::ApplyRequest { expected_revisions: [("vnics/a".to_owned(), 1)].into(), ..apply(&vnic("a")) };
    let status = client.apply(request).await.expect_err("another revision");
    assert_eq!(status.code(), Code::Aborted);

    let doctor = client.doctor(v1::DoctorRequest {}).await.expect("examined").into_inner();
    let titles: Vec<&str> = doctor.findings.iter().map(|finding| finding.title.as_str()).collect();
    for title in ["host", "daemon", "ports", "recent events", "last changes"] {
        assert!(titles.contains(&title), "{titles:?}");
    }
    let last = doctor.findings.iter().find(|finding| finding.title == "last changes").expect("it is listed");
    let changes = &last.children;
    assert!(changes[0].detail.contains(&format!("pid {}", std::process::id())), "{}", changes[0].detail);
}

#[tokio::test]
async fn a_watch_sees_what_is_there_and_each_change() {
    let bench = Bench::start().await;
    let mut client = bench.client().await;
    client.apply(apply(BLUE)).await.expect("applied");
    let request = v1::WatchRequest { kind: String::new() };
    let mut stream = client.watch(request).await.expect("watched").into_inner();
    let mut next = async || {
        let change = tokio::time::timeout(PATIENCE, stream.message()).await.expect("in time");
        let change = change.expect("no error").expect("it goes on");
        let state =
            change.resource.as_ref().and_then(|resource| resource.status.as_ref()).map(v1::Status::state);
        (change.kind(), state)
    };
    use v1::status::State;
    use v1::watch_response::Kind;
    assert_eq!(next().await, (Kind::Existing, Some(State::Ready)));
    let vnic = "vnics: [{name: a, switch: blue, attach: {veth: p9}, mac: '02:00:00:00:00:01'}]";
    client.apply(apply(vnic)).await.expect("applied");
    assert_eq!(next().await, (Kind::Created, Some(State::Pending)));
    bench.engine.world().netdevs.insert("p9".to_owned(), 99);
    let event = sluice_kernel::LinkEvent::Changed { ifindex: 99, name: "p9".to_owned() };
    assert!(bench.handle.links(vec![event]));
    assert_eq!(next().await, (Kind::Changed, Some(State::Ready)));
    let request =
        v1::DeleteRequest { resources: vec![reference("vnic", "a")], ..v1::DeleteRequest::default() };
    client.delete(request).await.expect("deleted");
    assert_eq!(next().await.0, Kind::Deleted);
}

#[tokio::test]
async fn after_a_restart_the_first_answer_is_of_a_finished_pass_and_after_the_end_there_is_none() {
    let bench = Bench::start().await;
    bench.client().await.apply(apply(BLUE)).await.expect("applied");
    bench.handle.stop();
    let job = |_: &mut Core| Ok(());
    while !matches!(bench.handle.call(job).await, Err(Error::Stopping)) {}

    let (state_dir, runtime_dir) = (bench.dir.path().join("state"), bench.dir.path().join("run"));
    let engine = FakeEngine::with_netdevs(&["up0"]);
    let behind = engine.clone();
    let make = move || -> Result<Core, StoreError> {
        let (store, state, origin) = Store::open(&state_dir, &runtime_dir)?;
        Ok(Core::new(store, state, origin, Box::new(behind)))
    };
    let (handle, thread) = reconcile::start(make, None).expect("started");
    let view = handle.view().borrow().clone();
    let status = view.resources.values().next().and_then(|blue| blue.status.clone()).expect("it is there");
    assert_eq!(status.state(), v1::status::State::Ready);
    handle.stop();
    thread.join().expect("no panic");
    let status = bench.client().await.get_drops(v1::GetDropsRequest {}).await.expect_err("nobody there");
    assert_eq!(status.code(), Code::Unavailable);
}

#[tokio::test]
async fn health_and_reflection_are_served() {
    let bench = Bench::start().await;
    let request = tonic_health::pb::HealthCheckRequest { service: "sluice.v1.Sluice".to_owned() };
    let health =
        HealthClient::new(bench.channel().await).check(request).await.expect("answered").into_inner();
    assert_eq!(health.status(), ServingStatus::Serving);
    let request = ServerReflectionRequest {
        host: String::new(),
        message_request: Some(MessageRequest::ListServices(String::new())),
    };
    let mut answers = ServerReflectionClient::new(bench.channel().await)
        .server_reflection_info(tokio_stream::once(request))
        .await
        .expect("answered")
        .into_inner();
    let answer = answers.message().await.expect("no error").expect("one answer");
    let Some(MessageResponse::ListServicesResponse(ListServiceResponse { service })) =
        answer.message_response
    else {
        panic!("another answer: {answer:?}");
    };
    assert!(service.iter().any(|service| service.name == "sluice.v1.Sluice"), "{service:?}");
}

#[tokio::test]
async fn a_socket_is_private_and_is_not_stolen() {
    use std::os::unix::fs::PermissionsExt;
    let dir = tempfile::tempdir().expect("a directory");
    let path = dir.path().join("a/socket");
    let listener = bind(&path, 0o660).expect("bound");
    let mode = std::fs::metadata(&path).expect("there").permissions().mode();
    assert_eq!(mode & 0o777, 0o660);
    assert!(matches!(bind(&path, 0o600), Err(SocketError::InUse(_))));
    drop(listener);
    bind(&path, 0o600).expect("a dead socket is replaced");
    let file = dir.path().join("file");
    std::fs::write(&file, "precious").expect("written");
    assert!(matches!(bind(&file, 0o600), Err(SocketError::NotASocket(_))));
    assert_eq!(std::fs::read(&file).expect("still there"), b"precious");
}
