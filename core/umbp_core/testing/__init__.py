"""Fakes, plain models and hypothesis machines for the core's contracts; third parties may reuse them."""
