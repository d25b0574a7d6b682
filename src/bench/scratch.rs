//! The folder in which a bench makes all that it needs, and of which nothing is left.

use std::fmt::Display;
use std::future::Future;
use std::io;
use std::path::Path;

use super::executor::make_folder;
use crate::outcome::Failure;

/// Does the work in a folder of its own, which is not there yet and goes whatever comes between, such as the end of `interrupted`.
pub(super) async fn in_folder<T>(
    folder: &Path,
    interrupted: impl Future<Output = ()>,
    work: impl Future<Output = Result<T, Failure>>,
) -> Result<T, Failure> {
    make_folder(folder).map_err(|e| cannot("make", folder, &e))?;
    let result = tokio::select! {
        result = work => result,
        () = interrupted => Err(Failure::system("the bench was interrupted; nothing of it is left")),
    };
    let removed = remove(folder);
    let value = result?;
    removed?;
    Ok(value)
}

/// Removes a folder with all that is in it, if it is there.
pub(super) fn remove(folder: &Path) -> Result<(), Failure> {
    match std::fs::remove_dir_all(folder) {
        Err(e) if e.kind() != io::ErrorKind::NotFound => Err(cannot("remove", folder, &e)),
        _ => Ok(()),
    }
}

pub(super) fn cannot(what: &str, path: &Path, error: &dyn Display) -> Failure {
    Failure::system(format!("cannot {what} {}: {error}", path.display()))
}
