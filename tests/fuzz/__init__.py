"""Fuzzing of what others send us: the decoder, the whole host, and the guest's end of the wire.

``mutate`` makes messages that are wrong in every way we could think of, ``scenes`` says what must hold whatever
arrives, ``coverage`` lets atheris (libFuzzer) look for what we could not think of, ``flood`` sends a million to a host
process and weighs it. ``python -m tests.fuzz`` (``make fuzz``) runs all of it; the suite plays a little of each scene.
"""
