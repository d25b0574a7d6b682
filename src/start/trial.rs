//! With KVM or without: what was seen on this host decides, and where nothing was seen yet, this job's start is the trial.

use std::path::Path;
use std::time::Duration;

use super::Phases;
use super::cold::{Plan, Started, Unstarted, cold};
use super::hardware::{Hardware, host_arch};
use crate::kill::{self, Point};
use crate::machine::accelerator::{self, Combination, Decision, Facts, Policy, Seen};
use crate::machine::description::Accelerator;
use crate::machine::versions;
use crate::outcome::Failure;
use crate::report::JobLog;
use crate::settings::file;

/// How long a host's first guest under KVM may take before KVM is taken to hang: a guest that boots at all under
/// KVM answers within seconds.
const KVM_TRIAL: Duration = Duration::from_secs(45);

/// Starts the machine with the right accelerator and enters its guest.
pub async fn start(
    plan: &Plan<'_>,
    hardware: &Hardware<'_>,
    phases: &mut Phases,
    log: &JobLog,
) -> Result<Started, Failure> {
    let versions = hardware.libvirt.version().await?;
    if let Err(e) = versions::remember(&plan.state_dir, &plan.uri, &versions) {
        // Only config's answer is made of it.
        tracing::warn!("{e}");
    }
    let on = Combination::of_host(&versions.hypervisor_version);
    let accelerator = match decide(hardware, &plan.state_dir, &on).await? {
        Decision::Use(accelerator, because) => {
            tracing::debug!(?accelerator, ?because, "decided");
            accelerator
        }
        Decision::Trial => {
            log.line("Whether KVM boots guests on this host is not known yet: trying it.");
            let description = hardware.describe(Accelerator::Kvm).await?;
            match cold(
                plan,
                description,
                plan.guest.boot_timeout.min(KVM_TRIAL),
                hardware.libvirt,
                phases,
                log,
            )
            .await
            {
                Ok(started) => {
                    remember(plan, &on, Seen::Booted)?;
                    return Ok(started);
                }
                Err(Unstarted::Failed(failure)) => return Err(failure),
                Err(Unstarted::Unanswered(under_kvm)) => {
                    tracing::warn!("under KVM: {under_kvm}");
                    log.line("KVM does not boot this guest on this host: starting again with emulation, which is slower.");
                    hardware.libvirt.destroy(&plan.job.key().machine_name()).await?;
                    kill::point(Point::TrialEnded);
                    phases.end("kvm trial");
                    let started = started_with(Accelerator::Emulation, plan, hardware, phases, log).await?;
                    // Only now: a guest that emulation does not boot either says nothing about KVM.
                    remember(plan, &on, Seen::Hung)?;
                    return Ok(started);
                }
            }
        }
    };
    started_with(accelerator, plan, hardware, phases, log).await
}

async fn started_with(
    accelerator: Accelerator,
    plan: &Plan<'_>,
    hardware: &Hardware<'_>,
    phases: &mut Phases,
    log: &JobLog,
) -> Result<Started, Failure> {
    let description = hardware.describe(accelerator).await?;
    let started = cold(
        plan,
        description,
        plan.guest.boot_timeout,
        hardware.libvirt,
        phases,
        log,
    )
    .await;
    started.map_err(|e| match e {
        Unstarted::Unanswered(failure) | Unstarted::Failed(failure) => failure,
    })
}

fn remember(plan: &Plan<'_>, on: &Combination, seen: Seen) -> Result<(), Failure> {
    accelerator::remember(&plan.state_dir, on, seen)?;
    kill::point(Point::TrialNoted);
    Ok(())
}

async fn decide(hardware: &Hardware<'_>, state_dir: &Path, on: &Combination) -> Result<Decision, Failure> {
    let policy = match hardware.settings.accelerator {
        file::Accelerator::Auto => Policy::Auto,
        file::Accelerator::Kvm => Policy::Kvm,
        file::Accelerator::Emulation => Policy::Emulation,
    };
    let facts = Facts {
        device: accelerator::device(),
        offered: hardware
            .libvirt
            .offer(host_arch()?, Accelerator::Kvm)
            .await?
            .is_some(),
        seen: accelerator::recall(state_dir, on)?,
    };
    Ok(accelerator::decide(policy, &facts))
}
