"""How much memory tensors take while a block of code runs, counted as torch makes and drops them: on any device.

with Memory() as measured:
    loss = model(x)
    kept = measured.living()
    loss.backward()
measured.peak
"""

import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from turnout.parallel.fsdp import own


class Memory(TorchDispatchMode):
    """Bytes of the tensors that live, of those made inside but for views of `others`; `peak` is the most ever.

    A storage counts with the size that it has at the time: FSDP2 empties its own and fills them again.
    """

    def __init__(self, others=()):
        super().__init__()
        self.storages, self.peak = set(), 0
        self.others = {tensor.untyped_storage().data_ptr() for tensor in others}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **kwargs or {})
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                storage = own(tensor).untyped_storage()
                if storage.data_ptr() and storage.data_ptr() in self.others:
                    continue
                self.storages.add(StorageWeakRef(storage))
        self.peak = max(self.peak, self.living())
        return result

    def living(self):
        self.storages = {ref for ref in self.storages if not ref.expired()}
        found = (torch.UntypedStorage._new_with_weak_ptr(ref.cdata) for ref in self.storages)
        return sum(storage.nbytes() for storage in found if storage is not None)
