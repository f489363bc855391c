//! Standby brokers: which ones the members host, and that all of them know the same ones.
//!
//! A peer that hosts a broker says so in its hello. Each decree fixes the brokers of the next roster with it, so that all
//! members share one list, in one order, and keep it over a restart. Before the genesis a peer knows those that it heard of.

use std::collections::{BTreeMap, BTreeSet};

use crate::protocol::decree::STANDBYS_MAX;
use crate::protocol::{Action, Peer, Roster};
use crate::types::{Address, PeerId};

impl Peer {
    /// The brokers that members of the next roster host: by their hellos; where none was heard, by the parent decree.
    pub(in crate::protocol) fn next_standbys(&self, roster: &Roster) -> BTreeMap<PeerId, Address> {
        let parent = self.head().map(|head| &head.decree.standbys);
        let hosted = |peer: &PeerId| match self.neighbours.get(peer).and_then(|neighbour| neighbour.greeting.as_ref()) {
            _ if *peer == self.me => self.broker.clone(),
            Some(greeting) => greeting.broker.clone(),
            None => parent.and_then(|standbys| standbys.get(peer)).cloned(),
        };
        let mut seen = BTreeSet::new();
        let hosts = roster.members().iter().filter_map(|peer| Some((peer.clone(), hosted(peer)?)));
        hosts.filter(|(_, broker)| seen.insert(broker.clone())).take(STANDBYS_MAX).collect()
    }

    /// Tells the node which brokers there are beside those it was started with, whenever that changes.
    pub(in crate::protocol) fn tell_brokers(&mut self) {
        let brokers = match self.head() {
            Some(_) => self.durable.standbys().cloned().collect(),
            None => self.heard_brokers(),
        };
        if self.brokers_told != brokers {
            self.brokers_told.clone_from(&brokers);
            self.actions.push(Action::Brokers(brokers));
        }
    }

    fn heard_brokers(&self) -> Vec<Address> {
        let alike = self.neighbours.iter().filter(|(_, neighbour)| neighbour.difference.is_none());
        let others = alike.filter_map(|(peer, neighbour)| Some((peer, neighbour.greeting.as_ref()?.broker.as_ref()?)));
        let own = self.broker.as_ref().map(|broker| (&self.me, broker));
        let hosts: BTreeMap<&PeerId, &Address> = others.chain(own).collect();
        hosts.into_values().take(STANDBYS_MAX).cloned().collect()
    }
}

#[cfg(test)]
mod tests {
    use std::time::Instant;

    use super::*;
    use crate::protocol::message::{Body, Head, Hello};
    use crate::protocol::samples::{hello, id, identity, roster, says};
    use crate::protocol::{Config, Decree, Durable, Event, Identity};
    use crate::types::Digest;

    fn address(host: &str) -> Address {
        Address::new(&format!("{host}:1883")).unwrap()
    }

    /// Peer `a`, which hosts a broker of its own; `standbys`: as its newest decree has them, if it has one.
    fn peer(standbys: Option<&[(&str, &str)]>) -> Peer {
        let roster = roster(["a", "b", "c"]);
        let head = standbys.map(|standbys| Head {
            decree: Decree {
                leader: id("b"),
                standbys: standbys.iter().map(|(peer, host)| (id(peer), address(host))).collect(),
                ..Decree::sample(&roster)
            },
            accepts: vec![id("b"), id("c")],
            genesis: Digest::of(b"genesis"),
        });
        let durable = Durable { head, ..Durable::default() };
        let identity = Identity { broker: Some(address("own")), ..identity("a") };
        Peer::new(Config::default(), identity, Some(durable), &BTreeSet::new(), Instant::now())
    }

    /// What `peer` tells of brokers when it hears a hello.
    fn hears_hello(peer: &mut Peer, of: &str, broker: Option<&str>) -> Vec<Vec<Address>> {
        let hello = Hello { broker: broker.map(address), ..hello(peer) };
        told(peer.handle(says(of, 0, 0, Body::Hello(hello)), Instant::now()))
    }

    fn told(actions: Vec<Action>) -> Vec<Vec<Address>> {
        let brokers = actions.into_iter().filter_map(|action| match action {
            Action::Brokers(brokers) => Some(brokers),
            _ => None,
        });
        brokers.collect()
    }

    #[test]
    fn a_decree_names_what_hellos_say_and_else_what_its_parent_did() {
        let mut peer = peer(Some(&[("b", "old"), ("c", "kept"), ("d", "gone")]));
        hears_hello(&mut peer, "b", None);
        let roster = roster(["a", "b", "c", "e"]);
        let expected = [(id("a"), address("own")), (id("c"), address("kept"))];
        assert_eq!(peer.next_standbys(&roster), expected.into(), "b hosts none any more, d is no member");
        hears_hello(&mut peer, "e", Some("kept"));
        assert_eq!(peer.next_standbys(&roster).len(), 2, "two hosts of one broker");
    }

    #[test]
    fn no_more_standbys_are_named_than_a_decree_may_hold() {
        let mut peer = peer(Some(&[]));
        let names: Vec<String> = (10..50).map(|number| format!("p{number}")).collect();
        for name in &names {
            hears_hello(&mut peer, name, Some(name));
        }
        let roster = roster(&names);
        assert_eq!(peer.next_standbys(&roster).len(), STANDBYS_MAX);
    }

    #[test]
    fn before_the_genesis_a_peer_knows_what_it_heard_and_later_what_the_decree_says() {
        let mut early = peer(None);
        assert_eq!(told(early.handle(Event::Connected, Instant::now())), [[address("own")]]);
        assert_eq!(hears_hello(&mut early, "b", Some("b")), [[address("own"), address("b")]]);
        assert!(hears_hello(&mut early, "b", Some("b")).is_empty(), "nothing has changed");

        let mut late = peer(Some(&[("c", "c")]));
        assert_eq!(told(late.handle(Event::Connected, Instant::now())), [[address("c")]]);
        assert!(hears_hello(&mut late, "b", Some("b")).is_empty(), "only a decree is shared by all");
    }
}
