"""`weightd top`: a live view of a daemon in a terminal. Only this package imports textual, which may be missing.

`reader` asks the daemon in threads of its own and publishes snapshots. Pure modules turn a snapshot, and the view that
keys change, into lines of styled text. `widgets`, `screens` and `application` show these lines.
"""
