"""The main job: load and plan, train what the strategy requests, decide, hand over."""
