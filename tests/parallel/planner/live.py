"""How many bytes of tensors are alive on a process, operator by operator: storages, each once, as long as anything refers to them."""

import weakref

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Live(TorchDispatchMode):
    """`now` and `peak`, in bytes, of everything that is made in here and of what `note` was told of. Workspaces inside operators do not
    show. FSDP2 empties and refills storages in place; that is seen.
    """

    def __init__(self, *held):
        super().__init__()
        self.now = self.peak = 0
        self.known = weakref.WeakKeyDictionary()
        self.resize = torch.UntypedStorage.resize_
        self.note(*held)

    def note(self, *tensors):
        for tensor in tensors:
            tensor = tensor.to_local() if hasattr(tensor, "to_local") else tensor
            if tensor.device.type == "cpu":
                storage = tensor.untyped_storage()
                if storage not in self.known:
                    entry = self.known[storage] = [storage.nbytes()]
                    self._add(entry[0])
                    weakref.finalize(storage, self._gone, entry)

    def _add(self, size):
        self.now += size
        self.peak = max(self.peak, self.now)

    def _gone(self, entry):
        self.now -= entry[0]
        entry[0] = 0

    def __enter__(self):
        live = self

        def resize_(storage, size):
            found = live.resize(storage, size)
            entry = live.known.get(storage)
            if entry is not None:
                live._add(size - entry[0])
                entry[0] = size
            return found

        torch.UntypedStorage.resize_ = resize_
        return super().__enter__()

    def __exit__(self, *error):
        torch.UntypedStorage.resize_ = self.resize
        return super().__exit__(*error)

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if any(each.__torch_dispatch__ is not torch.Tensor.__torch_dispatch__ for each in types):
            return NotImplemented
        found = function(*args, **(kwargs or {}))
        self.note(*(each for each in tree_leaves(found) if isinstance(each, torch.Tensor)))
        return found
