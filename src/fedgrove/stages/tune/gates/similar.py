"""A key for each member, and each owner as a whole goes to the nearest: owners whose texts are alike train one member.

From *User-Centric Federated Learning* (Mestoukirdi et al., arXiv 2110.09869): owners are put into streams by how alike they
are, fixed before training. From *Crayon* (Bang et al., ACL 2024): a newcomer's weights come from how alike its text is to the
members'. Ours: alike are directions of the owners' text in the frozen model, not gradients, each relative to the mean of all
owners; streams are spherical k-means of owners, one point each, by the exact sums of :mod:`fedgrove.stages.tune.gates.keys`; an
owner belongs to one stream. All that is learnt of an owner is one direction, which needs noise only once: so this gate can be
used with differential privacy.

Do not use it where each owner has text of several kinds: its direction is then near no kind.
"""

from __future__ import annotations

from fedgrove.stages.tune.gates import Looks, keys

LOOKS: Looks = "features"
OF_CLIENTS = True
KEYS = keys.KEYS

begin, specs, is_valid, observe, sums, check = keys.begin, keys.specs, keys.is_valid, keys.observe, keys.sums, keys.check
settle, finish, kept, weights, surprise = keys.settle, keys.finish, keys.kept, keys.weights, keys.surprise
