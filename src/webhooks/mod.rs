//! Webhooks: receivers that asked for it are notified when a job ends, at least once, and no job waits for that.
//!
//! ```text
//! a job ends ─► [`outbox::ended`], in its transaction ─► webhook_delivery ◄─ [`deliverer`] ─► receiver
//!                                                             │  claims by a lease, tries, settles
//!                                                             └─ tried again for days, then `failed`
//! ```
//! [`registered`] has the receivers, [`outbox`] writes, claims and settles messages, [`deliveries`] shows them to their
//! owner and sends them again, [`deliverer`] is the only one that connects to receivers.

pub mod deliverer;
pub mod deliveries;
pub mod outbox;
pub mod registered;
