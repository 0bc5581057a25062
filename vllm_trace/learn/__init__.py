"""The learning plan as something one does: steps with Read, Run, See and Check, and exercises.

The text is data (``steps/*.toml``, ``references.toml``, ``exercises/``); the code here is an engine
for it. ``plan`` loads the text, ``passages`` finds what to read in the vLLM that is there, ``runs``
makes or finds the trace of a step, ``evidence`` and ``questions`` read it, ``progress`` remembers,
``exercises`` runs the reader's code in a process of its own.
"""
