//! `rodizio broker`: the embedded broker alone.

use std::net::SocketAddr;

use crate::cli::args::BrokerArgs;
use crate::cli::{Exit, Failure, Shell, interrupt, log, runtime};
use crate::cluster::{reachable_at, start_broker};
use crate::config::Layers;

/// Where a broker listens unless the user says otherwise: the port of MQTT, on this machine alone.
pub const LISTEN: &str = "127.0.0.1:1883";

/// So many peers have room, at the least.
const PEERS: usize = 1_000;

/// Runs the broker until Ctrl-C, which is its normal end.
pub fn run(args: &BrokerArgs, layers: &Layers, shell: &mut Shell) -> Result<Exit, Failure> {
    let settings = layers.settings()?;
    log::start(args.verbose, &shell.env, shell.stderr.colour, &indicatif::ProgressBar::hidden())?;
    runtime()?.block_on(async {
        let (_request, stop) = interrupt::listen();
        let listen = settings.listen.as_deref().unwrap_or(LISTEN);
        let broker = start_broker(listen, PEERS, settings.chunk_bytes).await?;
        writeln!(shell.stdout.out, "broker listens on {}", broker.addr())?;
        shell.stdout.out.flush()?;
        if !args.quiet {
            writeln!(shell.stderr.out, "{}Ctrl-C stops it", how_to_join(broker.addr()))?;
        }
        stop.requested().await;
        broker.stop().await;
        Ok(Exit::Finished)
    })
}

/// What other peers are to be told, and who can hear it.
pub fn how_to_join(addr: SocketAddr) -> String {
    let port = addr.port();
    let here = reachable_at(addr);
    if addr.ip().is_loopback() {
        return format!(
            "peers of this machine: rodizio join --broker {here}\n\
             for other machines: --listen 0.0.0.0:{port} (no password and no TLS yet: only in a network you trust)\n"
        );
    }
    let there = if addr.ip().is_unspecified() { format!("THIS-MACHINE:{port}") } else { addr.to_string() };
    format!(
        "peers: rodizio join --broker {there}\n\
         there is no password and no TLS yet: whoever reaches this address can take part and read along\n"
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn who_can_reach_the_broker_is_said() {
        let said = |addr: &str| how_to_join(addr.parse().unwrap());
        assert!(said("127.0.0.1:1883").contains("--listen 0.0.0.0:1883"));
        assert!(said("0.0.0.0:1884").contains("--broker THIS-MACHINE:1884"));
        assert!(said("192.168.1.20:1883").contains("--broker 192.168.1.20:1883"));
        for addr in ["127.0.0.1:1", "0.0.0.0:1"] {
            assert!(said(addr).contains("no password"));
        }
    }
}
