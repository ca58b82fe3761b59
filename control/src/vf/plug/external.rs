//! The plug by an orchestrator: it reads in the vNIC's status what it is asked ([`v1::VfRequest`]), does it, and answers
//! by the request's ticket (`AcknowledgeVf`).
//!
//! It answers a request once. Tickets grow over restarts of the daemon, so that what was meant for the last one is not
//! taken for an answer to this one. Whoever did not answer in time still sees the request until something else is asked;
//! by force nobody is waited for.

use std::time::{SystemTime, UNIX_EPOCH};

use sluice_proto::v1;
use v1::acknowledge_vf_request::Outcome;
use v1::vf_request::Action;

use super::{Candidate, Plug, PlugError, Progress};

/// The plug of one vNIC.
#[derive(Clone, Debug)]
pub struct External {
    /// What is asked now, and under which ticket.
    asked: Option<(Action, u64)>,
    /// What was answered, for the VF that it was about.
    answered: Option<(Action, Result<(), String>)>,
    /// The VF that all this is about.
    vf: Option<(String, u16)>,
    last_ticket: u64,
}

impl External {
    /// A plug of which nothing was asked.
    pub fn new() -> External {
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        // A million tickets a second are not given out, so they are higher after a restart.
        let last_ticket = u64::try_from(now.as_micros()).unwrap_or_default();
        External { asked: None, answered: None, vf: None, last_ticket }
    }

    /// What was answered; asks if nothing was.
    fn ask(&mut self, action: Action) -> Option<Result<(), String>> {
        if let Some((to, answer)) = &self.answered
            && *to == action
        {
            return Some(answer.clone());
        }
        if self.asked.is_none_or(|(asked, _)| asked != action) {
            self.last_ticket += 1;
            self.asked = Some((action, self.last_ticket));
        }
        None
    }

    /// Another VF is another matter.
    fn turn_to(&mut self, vf: &Candidate) {
        // The PF may be renamed meanwhile.
        let name = (vf.pci.clone().unwrap_or_else(|| vf.pf.clone()), vf.index);
        if self.vf.as_ref() != Some(&name) {
            self.asked = None;
            self.answered = None;
            self.vf = Some(name);
        }
    }

    /// The last thing asked or answered.
    fn last(&self) -> Option<Action> {
        self.asked.map(|(action, _)| action).or(self.answered.as_ref().map(|(action, _)| *action))
    }
}

impl Default for External {
    fn default() -> Self {
        External::new()
    }
}

fn progress(answer: Option<Result<(), String>>) -> Result<Progress, PlugError> {
    match answer {
        None => Ok(Progress::Pending),
        Some(Ok(())) => Ok(Progress::Done),
        Some(Err(reason)) => Err(PlugError::Refused(reason)),
    }
}

impl Plug for External {
    /// Orchestrators are asked, not looked at.
    fn check(&mut self) -> Result<(), PlugError> {
        Ok(())
    }

    fn plug(&mut self, vf: &Candidate) -> Result<Progress, PlugError> {
        self.turn_to(vf);
        match self.last() {
            // It was done before that.
            Some(Action::AwaitGuest) => Ok(Progress::Done),
            _ => progress(self.ask(Action::Plug)),
        }
    }

    /// A daemon that has asked nothing yet finds things as they were.
    fn is_active(&mut self, vf: &Candidate) -> Result<bool, PlugError> {
        self.turn_to(vf);
        match self.last() {
            None => Ok(true),
            Some(Action::Unplug | Action::Unspecified) => Ok(false),
            Some(Action::Plug) if self.answered.is_none() => Ok(false),
            Some(Action::Plug | Action::AwaitGuest) => {
                Ok(progress(self.ask(Action::AwaitGuest))? == Progress::Done)
            }
        }
    }

    fn unplug(&mut self, vf: &Candidate, by_force: bool) -> Result<Progress, PlugError> {
        self.turn_to(vf);
        // Who would not take it has nothing to give back.
        if matches!(self.answered, Some((Action::Plug, Err(_)))) && self.asked.is_none() {
            // The next time it is asked anew.
            self.answered = None;
            return Ok(Progress::Done);
        }
        // What was answered before holds no longer: whoever is given the VF again is asked again.
        if !matches!(self.answered, Some((Action::Unplug, _))) {
            self.answered = None;
        }
        let asked = progress(self.ask(Action::Unplug));
        if by_force { Ok(Progress::Done) } else { asked }
    }

    fn request(&self) -> Option<v1::VfRequest> {
        let (action, ticket) = self.asked?;
        Some(v1::VfRequest { action: action.into(), ticket, deadline_unix_ms: 0 })
    }

    fn acknowledge(&mut self, answer: &v1::AcknowledgeVfRequest) -> bool {
        let Some((action, ticket)) = self.asked else { return false };
        let result = match answer.outcome() {
            _ if ticket != answer.ticket => return false,
            Outcome::Unspecified => return false,
            Outcome::Done => Ok(()),
            Outcome::Refused if answer.reason.is_empty() => {
                Err("the orchestrator refused, and did not say why".to_owned())
            }
            Outcome::Refused => Err(format!("the orchestrator refused: {}", answer.reason)),
        };
        self.asked = None;
        self.answered = Some((action, result));
        true
    }
}

#[cfg(test)]
mod tests {
    use sluice_policy::net::MacAddr;

    use super::*;

    fn vf(index: u16) -> Candidate {
        Candidate { pf: "pf0".into(), index, pci: None, netdev: None, mac: MacAddr([2, 0, 0, 0, 0, 1]) }
    }

    /// What is asked, and the ticket.
    fn asked(plug: &External) -> (Action, u64) {
        let request = plug.request().expect("something is asked");
        (request.action(), request.ticket)
    }

    fn answer(plug: &mut External, ticket: u64, outcome: Outcome, reason: &str) -> bool {
        plug.acknowledge(&v1::AcknowledgeVfRequest {
            vnic: "web".into(),
            ticket,
            outcome: outcome.into(),
            reason: reason.into(),
            ..v1::AcknowledgeVfRequest::default()
        })
    }

    fn answer_done(plug: &mut External) {
        let (_, ticket) = asked(plug);
        assert!(answer(plug, ticket, Outcome::Done, ""));
    }

    fn is(result: Result<Progress, PlugError>, wanted: Progress) {
        assert_eq!(result.expect("no error"), wanted);
    }

    #[test]
    fn each_step_is_asked_once_and_answered_by_its_ticket() {
        let mut plug = External::new();
        let vf = vf(3);
        plug.check().expect("nothing to check");
        assert_eq!(plug.request(), None);
        is(plug.plug(&vf), Progress::Pending);
        let (action, first) = asked(&plug);
        assert_eq!(action, Action::Plug);
        is(plug.plug(&vf), Progress::Pending);
        assert_eq!(asked(&plug).1, first, "asking again is no new request");
        assert!(!plug.is_active(&vf).expect("no error"), "it is not even plugged");

        assert!(!answer(&mut plug, first - 1, Outcome::Done, ""), "a stale ticket");
        assert!(!answer(&mut plug, first, Outcome::Unspecified, ""), "no outcome");
        assert!(answer(&mut plug, first, Outcome::Done, ""));
        assert!(!answer(&mut plug, first, Outcome::Done, ""), "it was answered");
        is(plug.plug(&vf), Progress::Done);
        assert_eq!(plug.request(), None);

        assert!(!plug.is_active(&vf).expect("no error"));
        assert_eq!(asked(&plug).0, Action::AwaitGuest);
        // Plugging again is done, and does not take back what is asked now.
        is(plug.plug(&vf), Progress::Done);
        answer_done(&mut plug);
        for _ in 0..2 {
            assert!(plug.is_active(&vf).expect("no error"));
            is(plug.plug(&vf), Progress::Done);
        }

        is(plug.unplug(&vf, false), Progress::Pending);
        assert_eq!(asked(&plug).0, Action::Unplug);
        assert!(!plug.is_active(&vf).expect("no error"));
        answer_done(&mut plug);
        is(plug.unplug(&vf, false), Progress::Done);
        is(plug.unplug(&vf, true), Progress::Done);
        assert_eq!(plug.request(), None);
        is(plug.plug(&vf), Progress::Pending);
        assert_eq!(asked(&plug).0, Action::Plug, "the next round");
    }

    #[test]
    fn a_refusal_tells_its_reason_and_needs_no_unplugging() {
        let mut plug = External::new();
        is(plug.plug(&vf(0)), Progress::Pending);
        let (_, ticket) = asked(&plug);
        assert!(answer(&mut plug, ticket, Outcome::Refused, "no slot is free"));
        for _ in 0..2 {
            let error = plug.plug(&vf(0)).expect_err("it refused");
            assert!(
                matches!(&error, PlugError::Refused(text) if text.ends_with("no slot is free")),
                "{error}"
            );
        }
        is(plug.unplug(&vf(0), false), Progress::Done);
        assert_eq!(plug.request(), None);
        // With the next VF, it is asked again.
        is(plug.plug(&vf(1)), Progress::Pending);
        assert_eq!(asked(&plug).0, Action::Plug);
    }

    #[test]
    fn nobody_is_waited_for_by_force_and_the_request_stays() {
        let mut plug = External::new();
        is(plug.plug(&vf(0)), Progress::Pending);
        answer_done(&mut plug);
        is(plug.unplug(&vf(0), false), Progress::Pending);
        let (_, ticket) = asked(&plug);
        is(plug.unplug(&vf(0), true), Progress::Done);
        assert_eq!(asked(&plug), (Action::Unplug, ticket));
        assert!(answer(&mut plug, ticket, Outcome::Refused, "the guest clings"));
        plug.unplug(&vf(0), false).expect_err("it refused");
        is(plug.unplug(&vf(0), true), Progress::Done);
    }

    #[test]
    fn who_did_not_answer_is_asked_to_give_it_back() {
        let mut plug = External::new();
        is(plug.plug(&vf(0)), Progress::Pending);
        let (_, ticket) = asked(&plug);
        is(plug.unplug(&vf(0), false), Progress::Pending);
        assert_eq!(asked(&plug).0, Action::Unplug);
        assert!(!answer(&mut plug, ticket, Outcome::Done, ""), "that is asked no more");
    }

    #[test]
    fn a_new_daemon_finds_things_as_they_were_and_has_higher_tickets() {
        let mut old = External::new();
        is(old.plug(&vf(0)), Progress::Pending);
        let (_, ticket) = asked(&old);
        let mut new = External::new();
        assert!(new.is_active(&vf(0)).expect("no error"));
        assert_eq!(new.request(), None);
        is(new.unplug(&vf(0), false), Progress::Pending);
        assert!(asked(&new).1 > ticket);
    }
}
