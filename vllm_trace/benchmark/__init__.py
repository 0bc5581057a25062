"""The verb ``bench``: a real vLLM engine beside a contiguous preallocated cache, on the same memory.

Another thing than ``python -m bench`` at the top of the repository, which measures what *tracing* costs.

``small`` is the engine written here, with a contiguous cache or with pages; ``arms`` drives it and vLLM alike;
``measure`` holds the three tests, ``view``, ``page`` and ``plot`` show their figures.
"""
