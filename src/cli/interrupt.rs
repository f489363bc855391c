//! Ctrl-C, and the request to end that service managers and containers send.

use tokio::sync::watch;

use crate::cli::Exit;
use crate::cluster::Stop;

/// Listens from now on: the first Ctrl-C asks to stop, the second ends the program at once.
///
/// Must be called inside a runtime.
pub fn listen() -> (watch::Sender<bool>, Stop) {
    let (request, stop) = Stop::new();
    let requested = request.clone();
    tokio::spawn(async move {
        asked().await;
        requested.send_replace(true);
        asked().await;
        std::process::exit(Exit::Interrupted as i32);
    });
    (request, stop)
}

#[cfg(unix)]
async fn asked() {
    use tokio::signal::unix::{SignalKind, signal};
    let terminate = async {
        match signal(SignalKind::terminate()) {
            Ok(mut signal) => signal.recv().await,
            Err(_) => std::future::pending().await,
        }
    };
    tokio::select! {
        () = ctrl_c() => {}
        _ = terminate => {}
    }
}

#[cfg(not(unix))]
async fn asked() {
    ctrl_c().await;
}

/// Where signals cannot be listened to they end the program, as if this were not here.
async fn ctrl_c() {
    if tokio::signal::ctrl_c().await.is_err() {
        std::future::pending::<()>().await;
    }
}
