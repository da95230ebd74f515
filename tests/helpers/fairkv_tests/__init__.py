# SPDX-License-Identifier: Apache-2.0
"""What tests of several folders share: references, models of the engine, real engines, inputs."""
