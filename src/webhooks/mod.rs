//! Webhooks: whoever asked for it is told when a job ends, at least once, and nobody waits for that.
//!
//! ```text
//! a job ends ─► [`outbox::ended`], in its transaction ─► webhook_delivery ◄─ [`deliverer`] ─► receiver
//!                                                             │  claims by a lease, tries, settles
//!                                                             └─ tried again for days, then `failed`
//! ```
//! [`registered`] has who is told, [`outbox`] writes, claims and settles messages, [`deliveries`] shows them to
//! their owner and sends them once more, [`deliverer`] is the only one that talks to receivers.

pub mod deliverer;
pub mod deliveries;
pub mod outbox;
pub mod registered;
