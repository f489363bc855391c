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
        let hosted = |peer: &PeerId| match self.neighbours.get(peer).and_then(|neighbour| neighbour.hello.as_ref()) {
            _ if *peer == self.me => self.broker.clone(),
            Some(hello) => hello.broker.clone(),
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
        let hellos = self.neighbours.iter().filter(|(_, neighbour)| neighbour.difference.is_none());
        let others = hellos.filter_map(|(peer, neighbour)| Some((peer, neighbour.hello.as_ref()?.broker.as_ref()?)));
        let own = self.broker.as_ref().map(|broker| (&self.me, broker));
        let hosts: BTreeMap<&PeerId, &Address> = others.chain(own).collect();
        hosts.into_values().take(STANDBYS_MAX).cloned().collect()
    }
}
