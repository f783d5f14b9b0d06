"""Secure aggregation: the server learns the sum of what clients send, and nothing of any one of them.

After Bonawitz et al., *Practical Secure Aggregation for Privacy-Preserving Machine Learning* (CCS 2017), the protocol
against an active server. One sum takes five rounds of messages; the paper's names are in brackets:

1. Every client makes two X25519 key pairs, for masks and for an encrypted channel, and signs the public halves with its
   long-term key (AdvertiseKeys): ``client.advertise``.
2. It checks the signatures of its neighbors and sends each of them, encrypted, a Shamir share of its two secrets: the seed
   of its mask key and the seed of its self-mask (ShareKeys): ``client.share``.
3. It adds to its input one keystream of its own, the self-mask, and for each neighbor a keystream that the neighbor
   subtracts, the pairwise mask (MaskedInputCollection): ``client.mask``. In the sum the pairwise masks cancel.
4. The survivors, whose masked inputs arrived, sign the list of survivors (ConsistencyCheck): ``client.confirm``.
5. Shown that enough clients signed the same list, each gives the server its shares of the survivors' self-masks and of the
   mask keys of those who dropped out, never both of one client (Unmasking): ``client.reveal``. With ``threshold`` shares
   of each secret the server subtracts the masks that are left in the sum: ``server.Opening``.

From the paper: all of that. From Bell et al., *Secure Single-Server Aggregation with (Poly)Logarithmic Overhead* (CCS 2020):
with many clients, only neighbors on a ring share masks. Ours:

- The secrets are 16 bytes, from which keys are derived, so that a share fits in 17 bytes.
- A client signs the session's parameters together with its keys, so that a server cannot tell clients different thresholds.
- Self-masks are committed to, so that the server notices a wrong share.
- Neighbors are drawn from the session's name, which the server chooses: sparse neighborhoods protect only against a server
  that follows the protocol.

Sums are taken in a ring (``masking``): uint8 holds votes, 0 or 1 of each client, modulo a power of two above the number of
clients; int32 is summed modulo 2³² and int64 modulo 2 to the session's bits. Senders must ensure that the true sum fits in the
ring. Masked values look random and do not compress, so a client sends as many bits as the ring has.

Not hidden: the sum itself, who took part, and names, shapes and dtypes of tensors.

Where to read what: ``session`` the public facts of a sum, ``client`` and ``server`` the two sides of the protocol,
``masking`` rings and keystreams, ``keys`` signatures, key agreement and derivation, ``sharing`` Shamir's secret sharing,
``store`` what a client remembers on its disk.
"""
