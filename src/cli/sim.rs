//! `rodizio sim`: replays the protocol with faults, by seed.

use std::io::Write;
use std::path::Path;
use std::time::Duration;

use anyhow::Context;

use crate::cli::args::SimArgs;
use crate::cli::{Exit, Failure, Shell};
use crate::sim::{self, Detail, Report, Scenario};
use crate::types::PeerId;

/// Runs every seed; the first violation ends it with exit code 1.
pub fn run(args: &SimArgs, shell: &mut Shell) -> Result<Exit, Failure> {
    let scenario = scenario(args)?;
    let detail = match args.verbose {
        0 => None,
        1 => Some(Detail::Notices),
        _ => Some(Detail::Messages),
    };
    // One seed is looked at closely; of many, each has a line.
    let detail = detail.or((args.seeds == 1).then_some(Detail::Commits));
    let mut totals = Totals::default();
    for seed in args.seed..args.seed.saturating_add(args.seeds) {
        let out = &mut shell.stdout.out;
        // A reader that left is noticed by the line after the run.
        let mut show = |at: Duration, peer: &PeerId, text: &str| {
            let _ = writeln!(out, "{:>9.3} s  {peer:<8} {text}", at.as_secs_f64());
        };
        let mut quiet = |_: Duration, _: &PeerId, _: &str| {};
        let result = match detail {
            Some(detail) => sim::run(&scenario, seed, detail, &mut show),
            None => sim::run(&scenario, seed, Detail::Commits, &mut quiet),
        };
        match result {
            Ok(report) => {
                writeln!(shell.stdout.out, "{}", line(seed, &report))?;
                totals.add(&report);
            }
            Err(violation) => {
                let hint = format!("replay it with `{}`", replay(args, seed));
                return Err(Failure::new(Exit::Internal, anyhow::anyhow!(violation)).hint(hint));
            }
        }
    }
    if args.seeds > 1 {
        writeln!(shell.stdout.out, "{totals}")?;
    }
    shell.stdout.out.flush()?;
    Ok(Exit::Finished)
}

fn scenario(args: &SimArgs) -> Result<Scenario, Failure> {
    let mut scenario = match &args.scenario {
        Some(path) => read(path)?,
        None => Scenario::default(),
    };
    if let Some(peers) = args.peers {
        scenario.peers = usize::from(peers);
        // Who is not there cannot be late, nor be waited for.
        scenario.late = scenario.late.min(scenario.peers - 1);
        scenario.min_peers = scenario.min_peers.min(scenario.peers - scenario.late);
    }
    Ok(scenario)
}

fn read(path: &Path) -> Result<Scenario, Failure> {
    let usage = |error: anyhow::Error| Failure::new(Exit::Usage, error);
    let text =
        std::fs::read_to_string(path).with_context(|| format!("cannot read {}", path.display())).map_err(usage)?;
    let scenario =
        Scenario::parse(&text).with_context(|| format!("{} is no scenario", path.display())).map_err(usage)?;
    Ok(scenario)
}

fn replay(args: &SimArgs, seed: u64) -> String {
    let scenario = args.scenario.as_ref().map(|path| format!(" --scenario {}", path.display())).unwrap_or_default();
    let peers = args.peers.map(|peers| format!(" --peers {peers}")).unwrap_or_default();
    format!("rodizio sim{scenario}{peers} --seed {seed} -v")
}

fn line(seed: u64, report: &Report) -> String {
    let Report { rounds, faults, reelections, messages, elapsed, quorum_lost, .. } = report;
    let seconds = elapsed.as_secs_f64();
    let (sent, arrived) = messages;
    let end = if *quorum_lost { "waits for a quorum that lost its state" } else { "finished" };
    format!(
        "seed {seed}: {end}, {rounds} rounds in {seconds:.1} s of virtual time; {faults} faults, {reelections} \
         re-elections, {sent} messages sent, {arrived} delivered"
    )
}

#[derive(Default)]
struct Totals {
    runs: u64,
    faults: u64,
    reelections: u64,
    quorum_lost: u64,
}

impl Totals {
    fn add(&mut self, report: &Report) {
        self.runs += 1;
        self.faults += report.faults;
        self.reelections += report.reelections;
        self.quorum_lost += u64::from(report.quorum_lost);
    }
}

impl std::fmt::Display for Totals {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Totals { runs, faults, reelections, quorum_lost } = self;
        write!(f, "{runs} runs, {faults} faults, {reelections} re-elections: no invariant was violated")?;
        if *quorum_lost > 0 {
            write!(f, "; {quorum_lost} wait for a quorum whose state is lost")?;
        }
        Ok(())
    }
}
