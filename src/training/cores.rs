//! The cores of this machine, which the peers of one process take in turns to train and evaluate.
//!
//! A hundred peers that train at once would need a hundred times the memory and keep every message waiting. And without a
//! pool of one's own, burn would compute on one that has a thread for each core, for every peer at the same time.

use std::sync::{LazyLock, Mutex, PoisonError};
use std::thread::available_parallelism;

use rayon::{ThreadPool, ThreadPoolBuilder};
use tokio::sync::{Semaphore, SemaphorePermit};
use tracing::warn;

static FREE: LazyLock<Semaphore> = LazyLock::new(|| Semaphore::new(count()));

/// Pools that nobody computes on just now: as many as ever were in use at once, which is no more than there are cores.
static IDLE: Mutex<Vec<ThreadPool>> = Mutex::new(Vec::new());

fn count() -> usize {
    available_parallelism().map_or(1, usize::from)
}

/// Some cores, until this is dropped.
#[derive(Debug)]
pub struct Cores {
    threads: usize,
    _taken: Option<SemaphorePermit<'static>>,
}

impl Cores {
    /// Waits for as many cores as `threads`, or for all of them if they are fewer.
    pub async fn take(threads: usize) -> Self {
        let wanted = u32::try_from(threads.clamp(1, count())).unwrap_or(u32::MAX);
        // An error would say that it was closed, which it never is.
        Self { threads, _taken: FREE.acquire_many(wanted).await.ok() }
    }

    /// Whether others are at work or not: for measurements.
    pub fn at_once(threads: usize) -> Self {
        Self { threads, _taken: None }
    }

    /// Computes on `threads` threads. What burn computes is the same to the bit on however many.
    pub fn run<R: Send>(&self, work: impl FnOnce() -> R + Send) -> R {
        let mut idle = IDLE.lock().unwrap_or_else(PoisonError::into_inner);
        let place = idle.iter().position(|pool| pool.current_num_threads() == self.threads);
        let pool = place.map(|place| idle.swap_remove(place));
        drop(idle);
        let name = |index| format!("train-{index}");
        let pool =
            pool.map_or_else(|| ThreadPoolBuilder::new().num_threads(self.threads).thread_name(name).build(), Ok);
        match pool {
            Ok(pool) => {
                let result = pool.install(work);
                IDLE.lock().unwrap_or_else(PoisonError::into_inner).push(pool);
                result
            }
            Err(error) => {
                warn!(%error, threads = self.threads, "no threads of its own to train on");
                work()
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn work_runs_on_as_many_threads_as_were_asked_for() {
        for threads in [1, 3, 1, 2] {
            assert_eq!(Cores::at_once(threads).run(rayon::current_num_threads), threads);
        }
    }

    #[tokio::test]
    async fn more_threads_than_cores_take_all_cores_and_give_them_back() {
        for _ in 0..3 {
            let all = Cores::take(10 * count()).await;
            assert!(all._taken.as_ref().is_some_and(|taken| taken.num_permits() == count()));
        }
    }
}
