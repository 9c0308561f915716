"""The wire that we speak ourselves: frames, messages, and what they mean, as pure functions of bytes.

``bounds``    how large anything may be
``frames``    the header, and bytes to frames
``codes``     what an error says
``hashes``    lists of hashes in one field; ``columns`` of numbers and bitmaps; ``names``, tables of nodes
``messages``  requests, and ``replies``; ``codec`` encodes and decodes them
``values_*``  messages to the values of the core and back

``docs/protocol.md`` describes all of it for those who write a client in another language.
"""
