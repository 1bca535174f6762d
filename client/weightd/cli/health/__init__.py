"""The checks of `weightd doctor`: `asking` looks, every other module judges what was found, without looking itself.

`daemon_look` is a process of its own. A judge takes facts and returns findings, so that a test can inject any machine.
"""
