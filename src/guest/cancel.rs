//! Ends all processes of a run in the guest.

use std::time::Duration;

use super::shell::{RUN_VARIABLE, RunId};
use super::ssh::{self, Connection};

/// How long the guest may take beyond the grace period: for finding processes in a busy machine, and for the kernel to
/// take killed ones apart.
const BEYOND_GRACE: Duration = Duration::from_secs(20);

/// What the guest says where the run has no process.
const NONE: &str = "none";

/// Why a run could not be cancelled.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// Some processes have survived even KILL.
    #[error("the guest could not end all processes of the cancelled script: {0}")]
    Left(String),
    /// The guest could not be told.
    #[error("the guest could not be told to cancel the script: {0}")]
    Ssh(#[from] ssh::Error),
}

/// Sends TERM to all processes of `run`, and KILL to those that are left after `grace`. Returns when none is left, and whether
/// there were any.
///
/// A process belongs to the run when `CANNERY_RUN` in its environment says so, which it keeps through `setsid`, `nohup` and double
/// forks; or when its parent belongs to it, or its session's leader did (`sudo` and `env -i` clear the environment).
pub async fn cancel(connection: &Connection, run: &RunId, grace: Duration) -> Result<bool, Error> {
    let text = orders(run, grace);
    let within = grace + BEYOND_GRACE;
    let output = match connection.sh(&text, within).await {
        // A server may allow one session per connection only.
        Err(ssh::Error::Refused(_)) => connection.again().await?.sh(&text, within).await?,
        other => other?,
    };
    if output.code == Some(0) {
        return Ok(output.stdout.trim() != NONE);
    }
    let said = format!("{} {}", output.stdout.trim(), output.stderr.trim());
    Err(Error::Left(said.trim().to_owned()))
}

/// The order as a text for `sh`: POSIX, and `grep -z`, which busybox has too; a guest may have nothing else.
fn orders(run: &RunId, grace: Duration) -> String {
    let run = run.as_str();
    let centiseconds = grace.as_millis() / 10;
    format!(
        r#"
known=' '
# All that were ever known: what one of them forks in its last moment is still in its session.
ever=' '
collect() {{
    old=$known
    known=' '
    # -z, since some kinds of grep see no further than the first NUL.
    for f in $(grep -lsz '^{RUN_VARIABLE}={run}$' /proc/[0-9]*/environ); do
        p=${{f#/proc/}}
        known="$known${{p%/environ}} "
    done
    # Number, parent and session of each; the name in parentheses may hold parentheses itself. A zombie is gone but for its
    # parent's asking, and the kernel's own threads are nobody's. One call for all: a shell reads such files byte by byte.
    set -- $(cat /proc/[0-9]*/stat 2>/dev/null |
        sed -n '/) [A-Z] [02] /d; s/^\([0-9]*\) (.*) [^ZX] \([0-9]*\) [0-9-]* \([0-9]*\) .*/\1:\2:\3/p')
    table=" $*"
    for p in $old; do
        case $known in *" $p "*) continue ;; esac
        case $table in *" $p:"*) known="$known$p " ;; esac
    done
    for p in $known; do
        case $ever in *" $p "*) ;; *) ever="$ever$p " ;; esac
    done
    more=1
    while [ "$more" ]; do
        more=
        for entry in $table; do
            p=${{entry%%:*}}
            case $known in *" $p "*) continue ;; esac
            rest=${{entry#*:}}
            case $known in *" ${{rest%:*}} "*) ;;
            *) case $ever in *" ${{rest#*:}} "*) ;; *) continue ;; esac ;;
            esac
            known="$known$p "
            case $ever in *" $p "*) ;; *) ever="$ever$p " ;; esac
            more=1
        done
    done
    case $known in *[0-9]*) return 0 ;; esac
    return 1
}}
strike() {{
    # Fails also where one of them has just ended by itself; then root finds nothing more to do.
    kill "$@" 2>/dev/null || [ "$(id -u)" = 0 ] || sudo -n kill "$@" 2>/dev/null
}}
now() {{
    read -r now rest </proc/uptime
    now=${{now%.*}}${{now#*.}}
}}
now
until=$((now + {centiseconds}))
# All are found before any is told: with its parent gone, a child that has cleared its environment belongs to nobody.
collect || {{ echo {NONE}; exit 0; }}
strike -TERM $known
# A stopped process sees TERM only when it goes on.
strike -CONT $known
while sleep 0.1 2>/dev/null || sleep 1; do
    collect || exit 0
    now
    [ "$now" -ge "$until" ] && break
done
rounds=0
while [ "$rounds" -lt 50 ]; do
    strike -KILL $known
    sleep 0.1 2>/dev/null || sleep 1
    collect || exit 0
    rounds=$((rounds + 1))
done
for p in $known; do
    read -r name <"/proc/$p/comm" && echo "$p ($name)"
done
exit 1
"#
    )
}
