"""Programs that hold the peers' ends, each in the language of its library.

An agent says one line of JSON at its start, ``{"version": "1.2.3"}``, and then reads a
:class:`~interop.matrix.task.Task` from every line of its standard input. A server answers
``{"id": ID, "listening": PORT}`` first. The last answer is ``{"id": ID, "reports": [REPORT, ...]}``
or ``{"id": ID, "error": "why"}``. Tasks run at the same time; the end of the input ends the agent.
"""
