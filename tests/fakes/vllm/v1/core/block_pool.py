"""A pool of blocks with a free queue; the classes that tests hook."""

from vllm.v1.core.pool_base import ImportedBase


class Base:
    def reset(self):
        """Forget everything."""
        self.free = [*range(self.num_blocks)]
        return True


class BlockPool(Base):
    made = 0

    def __init__(self, num_blocks):
        self.num_blocks = num_blocks
        self.reset()

    def get_new_blocks(self, num_blocks: int) -> list[int]:
        """Pop blocks from the head of the free queue."""
        if num_blocks > len(self.free):
            raise ValueError(f"no {num_blocks} free blocks")
        taken, self.free = self.free[:num_blocks], self.free[num_blocks:]
        return taken

    def free_blocks(self, ordered_blocks):
        """Read the blocks once: the argument may be an iterator."""
        for block in ordered_blocks:
            self.free.append(block)
        return len(self.free)

    @classmethod
    def of_size(cls, num_blocks):
        cls.made += 1
        return cls(num_blocks)

    @staticmethod
    def size_in_tokens(num_blocks, *, block_size=16):
        return num_blocks * block_size


class FarPool(ImportedBase):
    pass


if BlockPool.made == 0:

    def watermark(num_blocks):
        return num_blocks // 100
