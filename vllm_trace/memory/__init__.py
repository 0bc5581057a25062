"""How much of the KV-cache memory is used, how many users fit, what sharing saves: by arithmetic, checked by vLLM.

``shapes`` says how large a token is, ``workload`` how long requests are, ``calculate`` does the sums, ``keynumbers``
judges the tutorial's numbers by them, ``real`` asks the installed ``KVCacheManager`` the same questions.
"""
