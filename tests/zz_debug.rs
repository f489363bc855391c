use rodizio::sim::{self, Detail, Scenario};
#[test]
fn debug() {
    let name = std::env::var("SC").unwrap();
    let seed: u64 = std::env::var("SEED").unwrap().parse().unwrap();
    let detail = match std::env::var("D").as_deref() {
        Ok("2") => Detail::Messages,
        Ok("1") => Detail::Notices,
        _ => Detail::Commits,
    };
    let sc = Scenario::parse(&std::fs::read_to_string(format!("configs/sim/{name}.toml")).unwrap()).unwrap();
    let t = std::time::Instant::now();
    let r =
        sim::run(&sc, seed, detail, &mut |at, p, x| println!("{:.3} {p} {}", at.as_secs_f64(), &x[..x.len().min(300)]));
    println!("{r:?} {:?}", t.elapsed());
}
#[test]
fn many() {
    let count: u64 = std::env::var("COUNT").unwrap().parse().unwrap();
    for name in ["storm", "lossy", "churn", "pair", "calm"] {
        let sc = Scenario::parse(&std::fs::read_to_string(format!("configs/sim/{name}.toml")).unwrap()).unwrap();
        let mut seen = std::collections::BTreeMap::<String, (u64, u64, String)>::new();
        let (mut worst, mut re, mut lost) = (std::time::Duration::ZERO, 0, 0);
        for seed in 0..count {
            match sim::run(&sc, seed, Detail::Commits, &mut |_, _, _| {}) {
                Ok(r) => {
                    worst = worst.max(r.elapsed);
                    re += r.reelections;
                    lost += r.quorum_lost as u64;
                }
                Err(v) => {
                    let e = seen.entry(v.invariant.into()).or_insert((0, seed, v.to_string()));
                    e.0 += 1;
                }
            }
        }
        println!("{name}: worst {worst:?} reelections {re} lost {lost}");
        for (k, v) in seen {
            println!("   {k}: {} x, first {} {:.250}", v.0, v.1, v.2);
        }
    }
}
