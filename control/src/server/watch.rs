//! The stream of a Watch: differences between one published view and the next.

use std::sync::Arc;

use sluice_proto::v1;
use sluice_proto::v1::watch_response::Kind as Change;
use tokio::sync::{mpsc, watch};
use tokio_stream::Stream;
use tokio_stream::wrappers::ReceiverStream;
use tonic::Status;

use crate::core::View;
use crate::resource::Kind;

/// Answers under way to one reader; behind them, views are skipped.
const BUFFER: usize = 64;

/// What there is, and then every change, as long as the reader reads.
pub(super) fn changes(
    mut views: watch::Receiver<Arc<View>>,
    kind: Option<Kind>,
) -> impl Stream<Item = Result<v1::WatchResponse, Status>> {
    let (sender, receiver) = mpsc::channel(BUFFER);
    tokio::spawn(async move {
        let mut before = Arc::new(View::default());
        let mut created = Change::Existing;
        loop {
            let view = views.borrow_and_update().clone();
            for (change, resource) in differences(&before, &view, kind, created) {
                let answer = v1::WatchResponse {
                    kind: change.into(),
                    resource: Some(resource.as_ref().clone()),
                    revision: view.revision,
                };
                if sender.send(Ok(answer)).await.is_err() {
                    return;
                }
            }
            before = view;
            created = Change::Created;
            tokio::select! {
                changed = views.changed() => if changed.is_err() { return },
                () = sender.closed() => return,
            }
        }
    });
    ReceiverStream::new(receiver)
}

fn differences(
    before: &View,
    after: &View,
    kind: Option<Kind>,
    created: Change,
) -> Vec<(Change, Arc<v1::Resource>)> {
    let mut changes = Vec::new();
    for (key, resource) in &after.resources {
        match before.resources.get(key) {
            None => changes.push((key, created, resource)),
            Some(known) if !Arc::ptr_eq(known, resource) => changes.push((key, Change::Changed, resource)),
            Some(_) => {}
        }
    }
    let gone = before.resources.iter().filter(|(key, _)| !after.resources.contains_key(*key));
    changes.extend(gone.map(|(key, resource)| (key, Change::Deleted, resource)));
    let wanted = changes.into_iter().filter(|(key, _, _)| kind.is_none_or(|kind| key.kind == kind));
    wanted.map(|(_, change, resource)| (change, resource.clone())).collect()
}
