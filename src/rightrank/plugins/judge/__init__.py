"""plugins.judge"""
