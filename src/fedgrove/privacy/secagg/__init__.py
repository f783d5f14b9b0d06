"""Secure aggregation: the server learns the sum of the clients' inputs, and nothing else about any single input.

After Bonawitz et al., *Practical Secure Aggregation for Privacy-Preserving Machine Learning* (CCS 2017), the protocol
against an active server. One sum takes six phases of messages; the paper's names are in parentheses:

1. Each client makes two X25519 key pairs, for masks and for an encrypted channel, and signs the public keys with its
   long-term key (AdvertiseKeys): ``client.advertise``.
2. It checks the signatures of its neighbors and sends each of them encrypted Shamir shares of its two secrets: the seed
   of its mask key and the seed of its self-mask (ShareKeys): ``client.share``.
3. It decrypts the shares that it got, and names the neighbors whose shares it cannot read: ``client.receive``. Clients
   whose shares too few others can read are left out: ``server.clients_with_shares``.
4. It adds to its input the self-mask, a keystream that only this client knows, and for each neighbor a pairwise mask:
   one of the two adds the keystream and the other subtracts it (MaskedInputCollection): ``client.mask``. In the sum the
   pairwise masks cancel.
5. The survivors, whose masked inputs arrived, sign the list of survivors (ConsistencyCheck): ``client.confirm``.
6. After checking that enough clients signed the same list, each survivor sends the server its shares of the survivors'
   self-masks and of the mask keys of the clients that dropped out, never both of one client (Unmasking):
   ``client.reveal``. With ``threshold`` shares of each secret the server subtracts the remaining masks from the sum:
   ``server.Opening``.

All of this but phase 3 is from the paper. From Bell et al., *Secure Single-Server Aggregation with (Poly)Logarithmic
Overhead* (CCS 2020): with many clients, only neighbors on a ring share masks. Our additions:

- The secrets have 16 bytes, and keys are derived from them, so that a share fits into 17 bytes.
- The number of neighbors, the threshold and the quorum follow from the number of clients. No message contains them, so a
  server cannot choose weaker ones. A client signs the session, with all its clients, together with its keys.
- What survivors sign, and the encryption of shares, includes a digest of all clients' keys of this session (``hashes`` in phase
  2), and a client begins a session once. So messages of an earlier beginning of the same session are worthless.
- Phase 3, so that a client that sends unreadable shares is left out by itself and does not stop the sum.
- Each client sends a commitment to its self-mask's seed, so that the server notices a wrong share. It tries other sets of
  shares, and names the holder of the wrong one (``sharing.find_secret``).
- A client reveals shares only of neighbors with which it shares a mask: the server, which says in phase 4 who takes part,
  cannot split the survivors into parts.
- Neighbors are determined by the session's name, which the server chooses. So neighborhoods that do not include all
  clients protect only against a server that follows the protocol.

Sums are computed in a ring (``masking``): uint8 is for votes, 0 or 1 of each client, modulo a power of two above the
number of clients; int32 is summed modulo 2³² and int64 modulo 2 to the session's bits. Senders must ensure that the
true sum fits in the ring. Masked values look random and do not compress, so a client sends as many bits as the ring
has.

Not hidden: the sum itself, who took part, and names, shapes and dtypes of tensors.

Modules: ``session``: the public description of a sum; ``client`` and ``server``: the two sides of the protocol;
``masking``: rings and keystreams; ``keys``: signatures, key agreement and derivation; ``sharing``: Shamir's secret
sharing; ``store``: the state that a client keeps on its disk.
"""
