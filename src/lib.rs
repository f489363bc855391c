//! Federated learning without a server: the peers take turns to aggregate.
//!
//! Each round the peers of a *federation* elect one of themselves over MQTT. The others train the current model on
//! data that never leaves them; the elected *leader* pulls their updates, aggregates them, and the members make the
//! result theirs by a quorum of accepts. Next round it is somebody else's turn.
//!
//! # Layout
//!
//! The source has floors, and imports only point down (`tests/tidy.rs` checks it):
//!
//! | floor | what | modules |
//! |---|---|---|
//! | 5 people | one peer from its settings, the local cluster, measurements, what people and scripts see | [`peer`], [`cluster`], [`bench`](mod@bench), [`events`], [`rundir`], [`config`], [`cli`] |
//! | 4 meeting | the one loop, with a real clock or in virtual time | [`node`], [`sim`], [`jobs`], [`intake`] |
//! | 3 effects | models and data (burn), messages (rumqttc), the broker (rumqttd), durable state, memory used again | [`training`], [`transport`], [`broker`], [`journal`], [`packets`], [`buffers`] |
//! | 2 decisions | the protocol: pure, (event, now) → actions | [`protocol`] |
//! | 1 arithmetic | updates → model; blobs ↔ chunks | [`aggregation`], [`transfer`] |
//! | 0 words | names, numbers, weights | [`types`], [`weights`] |
//!
//! Below floor 3 there is no clock, no randomness, no IO and no thread: time comes in as an argument, slow work leaves
//! as a [`protocol::Job`] and returns as an event, everything else leaves as a [`protocol::Action`].
//!
//! # The trip of a tensor
//!
//! 1. A burn module's parameters are laid out as [`weights::Weights`]: one flat row of `f32` and a
//!    [`weights::Layout`] of names and shapes ([`training`]).
//! 2. [`jobs`] encodes the row ([`transfer::Codec`]), or, with a lossy codec, its difference from the round's model. The
//!    bytes are a *blob*, named by their blake3 digest, and kept by the [`journal`]; what `topk` does not send is another
//!    one, kept for the next update.
//! 3. The trainer announces a [`transfer::Manifest`] to the leader. The leader grants chunks, a window at a time; each
//!    chunk is a slice of the blob behind a small header, one MQTT message on the bulk connection ([`transport`]).
//! 4. The leader writes each chunk to its place in a file as it comes, and checks digest, layout and that every value is
//!    finite as the file grows ([`intake`]). Once all updates are in, it aggregates them in `PeerId` order, range by range
//!    from file to file ([`aggregation`]): what it needs of memory depends neither on the model nor on their number.
//! 5. The leader proposes a [`protocol::Decree`] that names the new blob. Members pull it (each chunk is published
//!    once, the broker fans out), verify it, make it durable and accept.
//! 6. A quorum of accepts commits. Every member loads the row back into its module, evaluates, and trains on.
//!
//! # Where the design was changed
//!
//! - **Genesis** is two steps instead of one: all founders first join one *roster* (a unanimous vote on names alone),
//!   then round 0 is a round like any other whose leader proposes the initial weights. Only the small step needs
//!   everybody, and the large one is crash-safe like every round ([`protocol`], `phases/genesis.rs`).
//! - **A leader's heartbeat says what it has** of each member, and members answer it with what is lacking. One message
//!   is so the retransmission timer of all reports, and hellos need not be heartbeats (they would grow as N²).
//! - **Patience grows with the lag** that peers measure on their lines, by their own hellos: on slow lines that lose
//!   packets a fixed timeout deposed leaders that had done nothing wrong (`protocol/lag.rs`).
//! - **A member is a name and an [`Incarnation`](types::Incarnation)**, the random number of its state directory: who lost the
//!   directory has forgotten its promises, and is a newcomer under its old name.
//! - **Newcomers** are admitted only as many at once as leave the members that live a quorum of the next roster.
//! - **Standby brokers** stand in the decree, beside the next roster: all members share one list, and keep it. The stay at
//!   the first broker is not three times the others' but grows with each search ([`protocol::roaming`] says why).
//! - **A manifest names its base**: lossy updates are differences from the parent model, which every leader holds, so that
//!   a codec's error is relative to what was learned. Models are never differences: a newcomer can read one alone.
//! - **The residual of `topk` is settled by the decree**: what was sent in vain returns to it. A peer that missed the commit
//!   of its round and learns of a later one does not know, and takes its update for counted: nothing is sent twice.
//! - **Inputs are standardised by what all founders have**: each one's join carries a summary of its columns (counts, means,
//!   sums of squared differences), the candidate merges them in `PeerId` order ([`aggregation::statistics`]), and every
//!   decree carries the result, so that Paxos makes it one and newcomers get it with the head. The constants are no part of
//!   the layout: a codec would round them each round. They stand beside the model's tensors in exported files.
//! - **The layout of a model for tables is known only after the genesis**: the summaries also count categories and classes,
//!   and those of all founders decide how many inputs and outputs it has. Until then hellos name no layout; the trainer makes
//!   its module when it is prepared ([`protocol::Action::Prepare`]), and [`protocol::Event::Prepared`] tells the layout
//!   before anything else happens. The classes of pictures and the characters of texts are compared as settings are.
//! - **What a strategy remembers stands in the model's blob** ([`aggregation::Section`]) and is computed by the leader alone, not
//!   by every peer from a committed aggregate: one mechanism decides, pulls, verifies, keeps and serves it, members need not
//!   compute, and a newcomer needs it anyway. It costs one or two models more in a broadcast.
//! - **Weights go round the router of the embedded broker**, which keeps a log for each filter: the log holds tickets, and the
//!   weights are freed when the last subscriber has taken them. So the broker's memory depends on what receivers have asked
//!   for, not on the number of filters, and a subscriber that stalls cannot make it grow ([`broker`], `shelf.rs`).
//! - **Only some members may train** (`fraction_train`): who does is drawn by the round's lot, more in each further term.
//! - **An update is announced before it is flushed**, unless it leaves something behind at its owner (`topk`, `scaffold`): no
//!   promise rests on it, and most rounds are over before a flush pays. It survives a crash of the process; after a loss of
//!   power it is made again, with the same bits. What a leader has pulled is not flushed at all: who leads next pulls it of its
//!   owners. A model is durable before it is accepted ([`transfer::Keep`]).
//! - **As many members flush a model while it comes as a quorum needs**; the others accept when the leader's next heartbeat
//!   asks again. After a commit they work with the model at once and flush it some seconds later: that a quorum has it for good
//!   is what the commit says, and members of one machine share its disk. After a loss of power they pull it again.
//! - **A finish names the last model**, so that a peer that was away can still pull it.

pub mod aggregation;
pub mod bench;
pub mod broker;
pub mod buffers;
pub mod cli;
pub mod cluster;
pub mod config;
pub mod events;
pub mod intake;
pub mod jobs;
pub mod journal;
pub mod node;
pub mod packets;
pub mod peer;
pub mod protocol;
pub mod rundir;
pub mod sim;
pub mod training;
pub mod transfer;
pub mod transport;
pub mod types;
pub mod weights;
