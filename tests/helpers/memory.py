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


class Memory(TorchDispatchMode):
    """Bytes of the tensors that live, of those made inside but for views of `others`; `peak` is the most ever."""

    def __init__(self, others=()):
        super().__init__()
        self.storages, self.peak = {}, 0
        self.others = {tensor.untyped_storage().data_ptr() for tensor in others}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **kwargs or {})
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                if self.others and storage.data_ptr() in self.others:
                    continue
                self.storages[StorageWeakRef(storage)] = storage.nbytes()
        self.peak = max(self.peak, self.living())
        return result

    def living(self):
        self.storages = {ref: size for ref, size in self.storages.items() if not ref.expired()}
        return sum(self.storages.values())
