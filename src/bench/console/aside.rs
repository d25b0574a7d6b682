//! Work in a thread of its own, so that it takes nothing from whoever measures.

use std::io;

use tokio::sync::oneshot;

use crate::outcome::Failure;
use crate::threads;

/// Work that goes on until it is done or this is dropped.
#[derive(Debug)]
pub(super) struct Aside<T> {
    _stop: oneshot::Sender<()>,
    answer: oneshot::Receiver<T>,
}

impl<T: Send + 'static> Aside<T> {
    /// Starts it on a runtime of its own.
    pub(super) fn start<F: Future<Output = T>>(
        name: &str,
        work: impl FnOnce() -> F + Send + 'static,
    ) -> Result<Self, Failure> {
        let (stop, stopped) = oneshot::channel::<()>();
        let (tell, answer) = oneshot::channel();
        let cannot = |e: io::Error| Failure::system(format!("cannot start a thread: {e}"));
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .map_err(cannot)?;
        threads::spawn(name, move || {
            runtime.block_on(async move {
                tokio::select! {
                    // Nobody may want to know any more.
                    done = work() => drop(tell.send(done)),
                    _ = stopped => {}
                }
            });
        })
        .map_err(cannot)?;
        Ok(Self { _stop: stop, answer })
    }

    /// Is it done?
    pub(super) fn is_done(&self) -> bool {
        !self.answer.is_empty()
    }

    /// Waits until it is.
    pub(super) async fn done(self) -> Result<T, Failure> {
        self.answer
            .await
            .map_err(|_| Failure::system("a part of the bench ended by itself"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn an_answer_comes_and_what_nobody_waits_for_ends() {
        let quick = Aside::start("quick", || async { 7 }).unwrap();
        assert_eq!(quick.done().await.unwrap(), 7);
        let (held, end) = oneshot::channel::<()>();
        let endless = Aside::start("endless", || async move {
            let _held = held;
            std::future::pending::<()>().await;
        })
        .unwrap();
        assert!(!endless.is_done());
        drop(endless);
        assert!(end.await.is_err(), "it holds what it was given no more");
    }
}
